use domain::{Message, Part, Role};

use crate::TextCodec;

/// What the processors of the DeepSeek-VL family put before a conversation without a system message.
pub(crate) const DEFAULT_SYSTEM_PROMPT: &str = "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist \
     the user with a variety of tasks using natural language.\n\n";

/// The conversation of checkpoints that were published without a template: DeepSeek-VL, Janus, Janus-Pro and JanusFlow in their original
/// form (spec: vision.md 6, janus.md 3).
#[derive(Debug)]
pub(crate) struct Turns {
    user: &'static str,
    assistant: &'static str,
    /// Stands for a picture.
    image: String,
    /// Ends an answer.
    eos: String,
}

impl Turns {
    /// The form that belongs to a tokenizer: roles are tokens where it has them, plain words elsewhere.
    pub fn of(codec: &TextCodec) -> Self {
        let role = |special: &'static str, plain: &'static str| if codec.token_id(special).is_some() { special } else { plain };
        let image = codec.tokens.image.as_ref().map_or(String::new(), |token| token.text.clone());
        Self { user: role("<|User|>", "User"), assistant: role("<|Assistant|>", "Assistant"), image, eos: codec.tokens.eos.text.clone() }
    }

    /// Renders a conversation; `system` comes first where it has no system message of its own. `content` is applied to every text that a
    /// client wrote.
    ///
    /// Turns end by their number, not by their role, as in the reference: the first, third and so on with an empty line, the others with
    /// the end-of-sentence token. A turn that says nothing is its role alone.
    pub fn render(&self, messages: &[Message], system: &str, reply: bool, content: &dyn Fn(&str) -> String) -> String {
        let (preambles, turns): (Vec<_>, Vec<_>) = messages.iter().partition(|message| message.role == Role::System);
        let mut text = if preambles.is_empty() { system.to_owned() } else { String::new() };
        for said in preambles.into_iter().map(|message| self.content(message, content)).filter(|said| !said.is_empty()) {
            text.extend([&said, "\n\n"]);
        }
        let mut asked = false; // whether the last turn is the place of the answer
        for (number, message) in turns.into_iter().enumerate() {
            let role = if message.role == Role::Assistant { self.assistant } else { self.user };
            let said = self.content(message, content);
            asked = said.is_empty() && message.role == Role::Assistant;
            match said.is_empty() {
                true => text.extend([role, ":"]),
                false => text.extend([role, ": ", &said, if number % 2 == 0 { "\n\n" } else { &self.eos }]),
            }
        }
        if reply && !asked {
            text.extend([self.assistant, ":"]);
        }
        text.trim().to_owned()
    }

    /// What a message says, without white space around it; a picture is its token on a line of its own.
    fn content(&self, message: &Message, content: &dyn Fn(&str) -> String) -> String {
        let part = |part: &Part| match part {
            Part::Text(text) => content(text),
            Part::Image(_) => format!("{}\n", self.image),
        };
        message.parts.iter().map(part).collect::<String>().trim().to_owned()
    }
}
