use tokenizers::Tokenizer;

/// The bytes of every token, in one block.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    bytes: Vec<u8>,
    tokens: Vec<Token>, // by id
}

#[derive(Debug, Clone, Copy)]
struct Token {
    begin: u32,
    end: u32,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// No token has this id.
    Absent,
    Ordinary,
    /// Left out where special tokens are skipped.
    Special,
}

impl Vocabulary {
    /// Reads the table out of a tokenizer whose decoder is byte-level.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let from_char = byte_of_char();
        let added = tokenizer.get_added_vocabulary();
        let size = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id + 1);
        let mut vocabulary = Self { bytes: Vec::new(), tokens: Vec::with_capacity(size as usize) };
        for id in 0..size {
            let token = tokenizer.id_to_token(id);
            let kind = match &token {
                None => Kind::Absent,
                Some(text) if added.is_special_token(text) => Kind::Special,
                Some(_) => Kind::Ordinary,
            };
            let begin = vocabulary.bytes.len() as u32; // a tokenizer file is far smaller than 4 GiB
            vocabulary.bytes.extend(token.map_or(Vec::new(), |text| token_bytes(&text, &from_char)));
            vocabulary.tokens.push(Token { begin, end: vocabulary.bytes.len() as u32, kind });
        }
        vocabulary
    }

    /// One more than the largest id.
    pub fn size(&self) -> usize {
        self.tokens.len()
    }

    /// What `id` decodes to; `None` where no token has it, or where it is special and those are skipped.
    #[inline]
    pub fn bytes(&self, id: u32, skip_special: bool) -> Option<&[u8]> {
        let token = self.tokens.get(id as usize)?;
        match token.kind {
            Kind::Absent => None,
            Kind::Special if skip_special => None,
            Kind::Ordinary | Kind::Special => Some(&self.bytes[token.begin as usize..token.end as usize]),
        }
    }
}

/// A token is written in an alphabet of 256 printable characters, one per byte. A token with any other character stands for itself.
fn token_bytes(token: &str, from_char: &[Option<u8>]) -> Vec<u8> {
    let byte = |char| from_char.get(char as usize).copied().flatten();
    token.chars().map(byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte-level alphabet, by code point: printable Latin-1 characters are their own byte, the other bytes follow from U+0100 on.
fn byte_of_char() -> Vec<Option<u8>> {
    let mut table = vec![None; 0x100];
    for byte in 0..=u8::MAX {
        match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => table[byte as usize] = Some(byte),
            _ => table.push(Some(byte)),
        }
    }
    table
}
