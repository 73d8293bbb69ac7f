use std::path::Path;
use std::sync::Arc;

use checkpoint::{Checkpoint, read_json};
use domain::{Invalid, Message, Part};
use serde_json::Value;
use tokenizers::{AddedToken, DecoderWrapper, Tokenizer};

use crate::error::one_line;
use crate::guard::Guard;
use crate::template::ChatTemplate;
use crate::tokens::Tokens;
use crate::turns::{DEFAULT_SYSTEM_PROMPT, Turns};
use crate::vocabulary::Vocabulary;
use crate::{Detokenizer, TextError};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";

/// No tokenizer of the family comes near: 100 000 tokens take about 5 MB.
const LARGEST: u64 = 128 << 20; // bytes

/// The tokenizer and chat template of one checkpoint. Share it in an `Arc`.
#[derive(Debug)]
pub struct TextCodec {
    /// Recognises every added token in text, as the reference does.
    pub(crate) full: Tokenizer,
    /// Takes the strings of control tokens for ordinary text.
    pub(crate) plain: Tokenizer,
    pub(crate) vocabulary: Arc<Vocabulary>,
    pub(crate) guard: Guard,
    pub(crate) tokens: Tokens,
    pub(crate) template: Option<ChatTemplate>,
    /// Takes the template's place in families that publish none.
    turns: Option<Turns>,
    /// Whether the model's processor puts its own system prompt before a conversation that has none.
    pub(crate) default_system_prompt: bool,
    /// Whether text may be cut behind every line feed without changing its ids.
    lines_are_apart: bool,
    add_bos: bool,
    eos_token_ids: Vec<u32>,
}

/// Encoding takes some 200 times the size of its text in memory, so long texts are encoded in pieces of this many bytes where lines allow.
const PIECE: usize = 64 << 10;

impl TextCodec {
    /// Loads the tokenizer of a checkpoint and refuses one that lacks a token which the model's family needs.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, TextError> {
        let mut codec = Self::load_dir(checkpoint.dir())?;
        let original = checkpoint.model_type() == "multi_modality";
        // Of the models that were published under that name, DeepSeek-VL is the one that does not draw (spec: vision.md 1).
        let draws = !original || ["gen_vision_config", "vision_gen_enc_config"].iter().any(|part| checkpoint.config().get(part).is_some());
        codec.tokens.require(checkpoint.model_type(), draws, &checkpoint.dir().join(CONFIG))?;
        codec.turns = original.then(|| Turns::of(&codec));
        Ok(codec)
    }

    /// Loads `tokenizer.json`, `tokenizer_config.json` and the optional files beside them.
    pub fn load_dir(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join(CONFIG);
        let config = read_json(&path)?.ok_or_else(|| TextError::file(&path, "missing"))?;
        let full = read_tokenizer(&dir.join(TOKENIZER))?;
        let tokens = Tokens::find(&full, &config, &path)?;
        let (plain, control) = without_control_tokens(&full)?;
        let add_bos = match config.get("add_bos_token") {
            Some(value) => value.as_bool().ok_or_else(|| TextError::file(&path, "field add_bos_token: true or false expected"))?,
            None => adds_bos(&full, &tokens)?,
        };
        if add_bos && tokens.bos.is_none() {
            return Err(TextError::file(&path, "field bos_token: missing, though add_bos_token is true"));
        }
        let vocabulary = Arc::new(Vocabulary::new(&full));
        let generation = read_json(&dir.join("generation_config.json"))?;
        let processor = read_json(&dir.join("processor_config.json"))?;
        let flag = |json: &Option<Value>, key| json.as_ref().and_then(|json| json.get(key)).and_then(Value::as_bool).unwrap_or(false);
        Ok(Self {
            template: ChatTemplate::find(dir, &config, &tokens)?,
            turns: None,
            default_system_prompt: flag(&processor, "use_default_system_prompt"),
            eos_token_ids: eos_token_ids(tokens.eos.id, generation.as_ref(), vocabulary.size()),
            lines_are_apart: lines_are_apart(&full),
            guard: Guard::new(control),
            full,
            plain,
            vocabulary,
            tokens,
            add_bos,
        })
    }

    /// Token ids of a text in which the strings of special tokens count as special tokens. With `bos`, the beginning-of-sentence token
    /// comes first where the tokenizer's configuration asks for it (also when the text begins with that token's string).
    pub fn encode(&self, text: &str, bos: bool) -> Vec<u32> {
        self.try_encode(text, bos).expect("byte-level BPE has ids for every text")
    }

    /// As [`TextCodec::encode`], for callers that would rather report a failure of the tokenizer than stop.
    pub fn try_encode(&self, text: &str, bos: bool) -> Result<Vec<u32>, TextError> {
        let mut ids: Vec<u32> = self.bos().filter(|_| bos).into_iter().collect();
        for piece in self.pieces(text) {
            ids.extend(encode_with(&self.full, piece)?);
        }
        Ok(ids)
    }

    /// Text of token ids. Bytes that are no UTF-8 become U+FFFD; ids that the tokenizer does not know contribute nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let bytes: Vec<u8> = ids.iter().filter_map(|&id| self.vocabulary.bytes(id, skip_special)).flatten().copied().collect();
        String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
    }

    /// The bytes of one token, which need not be whole characters; `None` for an id that the tokenizer does not know.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.vocabulary.bytes(id, false).map(<[u8]>::to_vec)
    }

    /// The id of a token by its string.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.full.token_to_id(token)
    }

    /// One more than the largest token id.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary.size()
    }

    /// Tokens that end a text answer: the tokenizer's, then those of `generation_config.json`.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Renders a conversation exactly as the chat template says. For showing and comparing: [`TextCodec::prepare`] encodes it safely.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TextError> {
        self.render_with(messages, add_generation_prompt, &str::to_owned)
    }

    /// Decodes a stream of token ids, ending it before the first of the `stop` strings.
    pub fn detokenizer(&self, stop: Vec<String>) -> Detokenizer {
        Detokenizer::new(self.vocabulary.clone(), stop)
    }

    /// Renders a conversation, `content` applied to every text that a client wrote.
    pub(crate) fn render_with(&self, messages: &[Message], reply: bool, content: &dyn Fn(&str) -> String) -> Result<String, TextError> {
        match (&self.template, &self.turns) {
            (Some(template), _) => template.render(messages, reply, content),
            (None, Some(turns)) => Ok(turns.render(messages, DEFAULT_SYSTEM_PROMPT, reply, content)),
            (None, None) => Err(Invalid::new("chat", "this checkpoint has no chat template: send a completion").into()),
        }
    }

    /// The beginning-of-sentence token, where prompts begin with it.
    pub(crate) fn bos(&self) -> Option<u32> {
        self.tokens.bos.as_ref().filter(|_| self.add_bos).map(|token| token.id)
    }

    /// `text` cut into pieces that can be encoded one by one: whole lines, about [`PIECE`] bytes, more where a line is longer.
    pub(crate) fn pieces<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let mut rest = text;
        std::iter::from_fn(move || {
            let end = if self.lines_are_apart { end_of_piece(rest.as_bytes()) } else { rest.len() };
            let (piece, after) = rest.split_at(end);
            rest = after;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// Refuses pictures where the tokenizer has no place for them.
    pub(crate) fn check_pictures(&self, parts: &[Part], field: &str, reason: Option<&str>) -> Result<(), Invalid> {
        let reason = reason.or_else(|| self.tokens.image.is_none().then_some("this model cannot see pictures"));
        let picture = parts.iter().position(|part| matches!(part, Part::Image(_)));
        match (picture, reason) {
            (Some(index), Some(reason)) => Err(Invalid::new(format!("{field}.parts[{index}].image"), reason)),
            _ => Ok(()),
        }
    }
}

/// Token ids of `text` as this tokenizer sees it, with nothing added.
pub(crate) fn encode_with(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, TextError> {
    let encoding = tokenizer.encode_fast(text, false).map_err(|error| TextError::Encode(one_line(&error)))?;
    Ok(encoding.get_ids().to_vec())
}

/// Where the first piece of `text` ends: behind the last line feed of the first [`PIECE`] bytes, else behind the first one at all.
fn end_of_piece(text: &[u8]) -> usize {
    let Some((first, rest)) = text.split_at_checked(PIECE).filter(|(_, rest)| !rest.is_empty()) else { return text.len() };
    let is_feed = |byte: &u8| *byte == b'\n';
    let in_first = first.iter().rposition(is_feed).map(|place| place + 1);
    let behind = || rest.iter().position(is_feed).map(|place| PIECE + place + 1);
    in_first.or_else(behind).unwrap_or(text.len())
}

/// The family's tokenizers put every CR and LF in a piece of its own before anything else, so no token spans a line feed and nothing on one
/// line has an influence on another. An added token with white space in or around it would be an exception.
fn lines_are_apart(full: &Tokenizer) -> bool {
    let pre_tokenizer = serde_json::to_value(full.get_pre_tokenizer()).unwrap_or_default();
    let first = &pre_tokenizer["pretokenizers"][0];
    let isolates = first["type"] == "Split" && first["behavior"] == "Isolated" && first["invert"] == false;
    let feeds = isolates && ["[\r\n]", r"[\r\n]"].iter().any(|regex| first["pattern"]["Regex"] == *regex);
    feeds && !full.get_added_tokens_decoder().values().any(|token| token.lstrip || token.rstrip || token.content.contains('\n'))
}

fn read_tokenizer(path: &Path) -> Result<Tokenizer, TextError> {
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => TextError::file(path, "missing"),
        _ => TextError::file(path, one_line(&error)),
    })?;
    if metadata.len() > LARGEST {
        return Err(TextError::file(path, format!("larger than {LARGEST} bytes")));
    }
    let data = std::fs::read(path).map_err(|error| TextError::file(path, one_line(&error)))?;
    // The tokenizers crate panics on broken JSON in some places, so it only gets to see JSON.
    serde_json::from_slice::<serde::de::IgnoredAny>(&data)
        .map_err(|error| TextError::file(path, format!("invalid JSON: {}", one_line(&error))))?;
    let mut tokenizer = Tokenizer::from_bytes(data).map_err(|error| TextError::file(path, one_line(&error)))?;
    if !matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
        return Err(TextError::file(path, "field decoder: only ByteLevel is supported"));
    }
    let normalizer = serde_json::to_value(tokenizer.get_normalizer()).unwrap_or_default();
    if normalizer["normalizers"].as_array().map_or(!normalizer.is_null(), |list| !list.is_empty()) {
        return Err(TextError::file(path, "field normalizer: text is never rewritten in this family, only an empty one is supported"));
    }
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| TextError::file(path, one_line(&error)))?;
    Ok(tokenizer)
}

/// A tokenizer that reads the strings of control tokens as ordinary text, and those strings.
///
/// Control tokens are the special ones and those written like one (`<...>`), which some checkpoints forget to call special. The other
/// added tokens stand for text: the family has some single characters among them.
fn without_control_tokens(full: &Tokenizer) -> Result<(Tokenizer, Vec<String>), TextError> {
    let looks_like_control = |text: &str| text.len() > 2 && text.starts_with('<') && text.ends_with('>');
    let is_control = |token: &AddedToken| token.special || looks_like_control(&token.content);
    let added = full.get_added_tokens_decoder();
    let control: Vec<AddedToken> = added.values().filter(|token| is_control(token)).cloned().collect();
    let strings = control.iter().map(|token| token.content.clone()).collect();
    let mut plain = full.clone();
    plain
        .add_special_tokens(control.into_iter().map(|token| AddedToken { special: true, ..token }))
        .map_err(|error| TextError::Encode(one_line(&error)))?;
    plain.set_encode_special_tokens(true);
    Ok((plain, strings))
}

/// Without `add_bos_token` in the configuration, what the tokenizer's own post-processor does decides.
fn adds_bos(full: &Tokenizer, tokens: &Tokens) -> Result<bool, TextError> {
    let encoding = full.encode_fast("", true).map_err(|error| TextError::Encode(one_line(&error)))?;
    Ok(tokens.bos.as_ref().is_some_and(|bos| encoding.get_ids().first() == Some(&bos.id)))
}

fn eos_token_ids(eos: u32, generation: Option<&Value>, vocabulary_size: usize) -> Vec<u32> {
    let mut ids = vec![eos];
    let value = generation.and_then(|json| json.get("eos_token_id"));
    let listed: &[Value] = value.and_then(Value::as_array).map_or_else(|| value.map_or(&[], std::slice::from_ref), Vec::as_slice);
    for id in listed.iter().filter_map(Value::as_u64).filter(|&id| id < vocabulary_size as u64) {
        if !ids.contains(&(id as u32)) {
            ids.push(id as u32);
        }
    }
    ids
}
