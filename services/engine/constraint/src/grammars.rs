use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use domain::Constraint;
use llguidance::{Matcher, ParserFactory};
use sched::{Guide, GuideError, Guides};
use text::TextCodec;
use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokRxInfo, TokTrie};

use crate::compile::{self, one_line};
use crate::guide::Progress;

/// Bytes of the longest token that the trie takes. A longer one is never allowed; the family has none.
const LONGEST: usize = 1000;

/// Compiled constraints that are kept: the choices of a request share one, and so do requests that ask for the same form again and again.
const KEPT: usize = 16;

/// Makes guides for one checkpoint. Its tokenizer is read when the first constraint comes: half a second and 90 MB for 100 000 tokens, which
/// whoever sends no constraints is spared.
pub struct Grammars {
    dir: PathBuf,
    vocabulary: OnceLock<Result<Vocabulary, String>>,
    /// At the beginning of a text; the one used last comes last.
    compiled: Mutex<Vec<(Constraint, Matcher)>>,
}

/// A tokenizer's vocabulary as the library takes it.
pub(crate) struct Vocabulary {
    pub factory: ParserFactory,
    /// The tokenizer's own end-of-sentence tokens, by which the library says that a text may end.
    pub eos_token_ids: Vec<u32>,
}

impl Grammars {
    /// Constraints over the tokenizer in the model folder `dir`.
    pub fn of(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), vocabulary: OnceLock::new(), compiled: Mutex::default() }
    }

    /// A parser of its own at the beginning of a text.
    fn matcher(&self, factory: &ParserFactory, constraint: &Constraint) -> Result<Matcher, GuideError> {
        if let Some(matcher) = self.kept(constraint) {
            return Ok(matcher);
        }
        let matcher = compile::matcher(factory, constraint)?;
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if compiled.len() == KEPT {
            compiled.remove(0);
        }
        compiled.push((constraint.clone(), matcher.deep_clone()));
        Ok(matcher)
    }

    fn kept(&self, constraint: &Constraint) -> Option<Matcher> {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let place = compiled.iter().position(|(kept, _)| kept == constraint)?;
        compiled[place..].rotate_left(1);
        compiled.last().map(|(_, matcher)| matcher.deep_clone())
    }

    fn vocabulary(&self) -> Result<&Vocabulary, GuideError> {
        let load = || {
            let codec = TextCodec::load_dir(&self.dir).map_err(|error| one_line(&error))?;
            Vocabulary::new(&codec)
        };
        self.vocabulary.get_or_init(load).as_ref().map_err(|reason| GuideError::Unable(reason.clone()))
    }
}

impl Guides for Grammars {
    fn guide(&self, constraint: &Constraint, eos_token_ids: &[u32]) -> Result<Box<dyn Guide>, GuideError> {
        let vocabulary = self.vocabulary()?;
        let matcher = self.matcher(&vocabulary.factory, constraint)?;
        Ok(Box::new(Progress::new(matcher, &vocabulary.eos_token_ids, eos_token_ids)))
    }
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Vocabulary {
    fn new(codec: &TextCodec) -> Result<Self, String> {
        let eos_token_ids = codec.eos_token_ids().to_vec();
        let words = words(codec);
        let first = eos_token_ids.first().ok_or("the tokenizer has no end-of-sentence token")?;
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, *first), &words).with_eos_tokens(&eos_token_ids);
        // "Approximate" takes the library's own tokenization for what it is: not the model's. So it forces no tokens upon the model.
        let environment: toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices).map_err(|error| one_line(&error))?;
        factory.quiet();
        *factory.limits_mut() = compile::limits();
        Ok(Self { factory, eos_token_ids })
    }
}

/// The bytes of every token by its id; none for one that no text leads to.
///
/// Control tokens are marked, so that the text of a constraint cannot be written with them: `<|User|>` in a JSON string is eight characters.
fn words(codec: &TextCodec) -> Vec<Vec<u8>> {
    let mut words: Vec<Vec<u8>> = (0..codec.vocabulary_size() as u32).map(|id| codec.token_bytes(id).unwrap_or_default()).collect();
    for word in &mut words {
        // A byte that is in no UTF-8, and that the library takes for its mark of control tokens.
        if word.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) || word.len() > LONGEST {
            word.clear();
        }
    }
    for id in codec.control_token_ids() {
        if let Some(word) = words.get_mut(id as usize).filter(|word| !word.is_empty()) {
            word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
        }
    }
    words
}
