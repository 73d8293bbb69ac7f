/// Something a client sent that cannot be taken, with the field at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Invalid {
    /// Path of the field as the client knows it, for example `sampling.top_p` or `chat.messages[2].parts[0].image`.
    pub field: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl Invalid {
    /// An error about `field`.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}
