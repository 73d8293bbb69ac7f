use domain::{Input, Invalid, Message, OutputKind, Part, Role};
use tokenizers::{OffsetReferential, OffsetType};

use crate::codec::encode_with;
use crate::guard::Mark;
use crate::tokens::Token;
use crate::turns::{DEFAULT_SYSTEM_PROMPT, Turns};
use crate::{TextCodec, TextError};

const NO_PICTURE: &str = "a picture cannot be part of the prompt for an image";

/// A request's input as the language model will see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    pub segments: Vec<PreparedSegment>,
    /// Guidance pair of `segments`, of the same length; empty for text output.
    pub unconditional: Vec<PreparedSegment>,
    /// Tokens that end a text answer.
    pub eos_token_ids: Vec<u32>,
}

/// Token ids, or the place of a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PreparedSegment {
    Tokens(Vec<u32>),
    /// Index of the picture in the order in which the input lists them.
    Image(u32),
}

impl TextCodec {
    /// Renders and encodes a request. Content of a conversation cannot become a control token; text of a completion can.
    ///
    /// Text output: a conversation goes through the chat template (or the family's own form where it publishes none), a completion stays as
    /// it is. Image output: a conversation becomes `{role}: {text}` turns without template or default system prompt, and the begin-of-image
    /// token comes last.
    /// Errors are [`TextError::Invalid`] with the field of the request, unless the checkpoint itself is at fault.
    pub fn prepare(&self, input: &Input, output: OutputKind) -> Result<Prepared, TextError> {
        check_not_empty(input)?;
        let mut prompt = Assembly::default();
        match (input, output) {
            (Input::Chat(messages), OutputKind::Text) => self.chat(messages, &mut prompt)?,
            (Input::Chat(messages), OutputKind::Image) => self.draw_chat(messages, &mut prompt)?,
            (Input::Completion { parts, bos }, OutputKind::Text) => self.completion(parts, *bos, None, &mut prompt)?,
            (Input::Completion { parts, bos }, OutputKind::Image) => self.completion(parts, *bos, Some(NO_PICTURE), &mut prompt)?,
        }
        let unconditional = match output {
            OutputKind::Text => Vec::new(),
            OutputKind::Image => self.guidance_pair(&mut prompt)?,
        };
        Ok(Prepared { segments: prompt.segments, unconditional, eos_token_ids: self.eos_token_ids().to_vec() })
    }

    fn chat(&self, messages: &[Message], prompt: &mut Assembly) -> Result<(), TextError> {
        for (index, message) in messages.iter().enumerate() {
            self.check_pictures(&message.parts, &format!("chat.messages[{index}]"), None)?;
        }
        let mark = Mark::absent_from(texts(messages))?;
        let protect = |text: &str| self.guard.protect(text, mark).into_owned();
        let mut rendered = self.render_with(messages, true, &protect)?;
        let has_system = messages.iter().any(|message| message.role == Role::System);
        if self.default_system_prompt && !has_system && !rendered.starts_with(DEFAULT_SYSTEM_PROMPT) {
            rendered.insert_str(0, DEFAULT_SYSTEM_PROMPT);
        }
        self.encode_protected(&rendered, mark, prompt)?;
        let pictures = messages.iter().flat_map(|message| &message.parts).filter(|part| matches!(part, Part::Image(_))).count();
        if pictures != prompt.pictures as usize {
            return Err(TextError::Template(format!("{pictures} pictures in the conversation, {} in the rendered text", prompt.pictures)));
        }
        self.begin(prompt);
        Ok(())
    }

    /// The conversation of the image-generation examples: no template, no default system prompt, contents trimmed.
    fn draw_chat(&self, messages: &[Message], prompt: &mut Assembly) -> Result<(), TextError> {
        for (index, message) in messages.iter().enumerate() {
            self.check_pictures(&message.parts, &format!("chat.messages[{index}]"), Some(NO_PICTURE))?;
        }
        let mark = Mark::absent_from(texts(messages))?;
        let protect = |text: &str| self.guard.protect(text, mark).into_owned();
        let text = Turns::of(self).render(messages, "", true, &protect);
        self.encode_protected(&text, mark, prompt)?;
        self.begin(prompt);
        Ok(())
    }

    fn completion(&self, parts: &[Part], bos: bool, refusal: Option<&str>, prompt: &mut Assembly) -> Result<(), TextError> {
        self.check_pictures(parts, "completion", refusal)?;
        let mut text = String::new(); // neighbouring text parts are one text
        for part in parts {
            match part {
                Part::Text(more) => text.push_str(more),
                Part::Image(_) => {
                    prompt.ids(&self.try_encode(&std::mem::take(&mut text), false)?);
                    self.picture(prompt);
                }
            }
        }
        prompt.ids(&self.try_encode(&text, false)?);
        if bos {
            self.begin(prompt);
        }
        Ok(())
    }

    /// Encodes rendered text: control tokens in it are the template's own, everything between them is ordinary text once the marks are
    /// taken out. The text between two control tokens is encoded as a whole, since a token may span content and template.
    fn encode_protected(&self, rendered: &str, mark: Mark, prompt: &mut Assembly) -> Result<(), TextError> {
        let image = self.tokens.image.as_ref().map(|token| token.id);
        for piece in self.pieces(rendered) {
            let split = self.full.get_added_vocabulary().extract_and_normalize(self.full.get_normalizer(), piece);
            for (text, _, tokens) in split.get_splits(OffsetReferential::Normalized, OffsetType::None) {
                match tokens.as_ref().and_then(|tokens| tokens.first()) {
                    Some(token) if Some(token.id) == image => self.picture(prompt),
                    Some(token) => prompt.ids(&[token.id]),
                    None => prompt.ids(&encode_with(&self.plain, &mark.lift(text))?),
                }
            }
        }
        Ok(())
    }

    /// A slot, with the begin and end tokens of families that have them.
    fn picture(&self, prompt: &mut Assembly) {
        let ids = |token: &Option<Token>| token.as_ref().map(|token| token.id);
        prompt.ids(ids(&self.tokens.begin_image).as_slice());
        prompt.segments.push(PreparedSegment::Image(prompt.pictures));
        prompt.pictures += 1;
        prompt.ids(ids(&self.tokens.end_image).as_slice());
    }

    /// Puts the beginning-of-sentence token first where the configuration asks for it and the text has not done so itself.
    fn begin(&self, prompt: &mut Assembly) {
        let Some(bos) = self.bos() else { return };
        match prompt.segments.first_mut() {
            Some(PreparedSegment::Tokens(ids)) if ids.first() == Some(&bos) => {}
            Some(PreparedSegment::Tokens(ids)) => ids.insert(0, bos),
            _ => prompt.segments.insert(0, PreparedSegment::Tokens(vec![bos])),
        }
    }

    /// Ends an image prompt with the begin-of-image token, and gives the same prompt with everything but that and BOS padded.
    fn guidance_pair(&self, prompt: &mut Assembly) -> Result<Vec<PreparedSegment>, TextError> {
        let (Some(begin), Some(pad)) = (&self.tokens.begin_image, &self.tokens.pad) else {
            return Err(Invalid::new("output", "this model cannot draw").into());
        };
        if !matches!(prompt.segments.last(), Some(PreparedSegment::Tokens(ids)) if ids.last() == Some(&begin.id)) {
            prompt.ids(&[begin.id]);
        }
        let [PreparedSegment::Tokens(ids)] = prompt.segments.as_slice() else {
            return Err(TextError::Template("a picture in the prompt for an image".into()));
        };
        let mut unconditional = vec![pad.id; ids.len()];
        if ids.first().copied() == self.tokens.bos.as_ref().map(|bos| bos.id) {
            unconditional[0] = ids[0];
        }
        unconditional[ids.len() - 1] = begin.id;
        Ok(vec![PreparedSegment::Tokens(unconditional)])
    }
}

/// A prompt under construction: never two segments of tokens side by side, never an empty one.
#[derive(Debug, Default)]
struct Assembly {
    segments: Vec<PreparedSegment>,
    /// Slots so far.
    pictures: u32,
}

impl Assembly {
    fn ids(&mut self, ids: &[u32]) {
        match self.segments.last_mut() {
            _ if ids.is_empty() => {}
            Some(PreparedSegment::Tokens(tokens)) => tokens.extend_from_slice(ids),
            _ => self.segments.push(PreparedSegment::Tokens(ids.to_vec())),
        }
    }
}

fn texts(messages: &[Message]) -> impl Iterator<Item = &str> + Clone {
    messages.iter().flat_map(|message| &message.parts).filter_map(|part| match part {
        Part::Text(text) => Some(text.as_str()),
        Part::Image(_) => None,
    })
}

/// A request must say something: templates would otherwise turn nothing into a prompt.
fn check_not_empty(input: &Input) -> Result<(), Invalid> {
    let says_something = input.parts().any(|part| match part {
        Part::Text(text) => !text.is_empty(),
        Part::Image(_) => true,
    });
    match input {
        _ if says_something => Ok(()),
        Input::Chat(messages) if messages.is_empty() => Err(Invalid::new("chat.messages", "a conversation needs at least one message")),
        Input::Chat(_) => Err(Invalid::new("chat.messages", "all messages are empty")),
        Input::Completion { .. } => Err(Invalid::new("completion.parts", "the prompt is empty")),
    }
}
