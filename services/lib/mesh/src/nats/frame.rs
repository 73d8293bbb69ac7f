//! What the payload of a mesh message holds: one header, then frames.
//!
//! ```text
//! header (40 bytes)  version u8 · kind u8 · sender's node id [22] · sender's epoch u32 · call id u64 · sequence number u32
//! frame              kind u8 · length u32 · that many bytes
//! ```
//!
//! Numbers are big-endian. Messages that carry parts of a call's head, data or end are numbered from 0 per call and direction, so
//! a lost one is noticed at the next; control messages (credit, cancel, location) carry [`UNNUMBERED`] and may be lost or
//! repeated without harm. Everything here comes from outside: decoding never panics and never allocates by a length it reads.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tonic::{Code, Status};

/// Raised when a peer of the previous version would misread something.
const VERSION: u8 = 1;
const UNNUMBERED: u32 = u32::MAX;

/// The length of every header and every frame's own header, in bytes.
pub(crate) const HEADER_BYTES: usize = 2 + NODE_ID_BYTES + 4 + 8 + 4;
pub(crate) const FRAME_HEADER_BYTES: usize = 5;
const NODE_ID_BYTES: usize = 22;

/// A process's name in the mesh: a NUID, 22 letters and digits, which is also a token of a NATS subject.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeId([u8; NODE_ID_BYTES]);

impl std::hash::Hash for NodeId {
    /// By its second half, the part in which the names that one process makes differ.
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        let [.., a, b, c, d, e, f, g, h] = self.0;
        state.write_u64(u64::from_be_bytes([a, b, c, d, e, f, g, h]));
    }
}

impl NodeId {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; NODE_ID_BYTES] = text.as_bytes().try_into().ok()?;
        bytes.iter().all(u8::is_ascii_alphanumeric).then_some(Self(bytes))
    }

    pub(crate) fn as_str(&self) -> &str {
        // Always ASCII, see `parse`.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl std::fmt::Debug for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// The first message of a call, to any instance of its target.
    Open = 1,
    /// Later messages of a call, to the instance that runs it.
    ToServer = 2,
    /// Messages of a call to its caller.
    ToClient = 3,
    /// "Are you there?", to one node; answered in kind.
    Probe = 4,
    /// "Who runs these calls of mine?", to all instances of a target; each answers in kind.
    Who = 5,
    /// "Who takes calls?", to all instances of a target; each that does answers in kind. Or "do you?", to one of them.
    Locate = 6,
    /// Nothing: only counts as a message.
    Void = 7,
}

impl Kind {
    /// What a message says it is about, before it is decoded.
    pub(crate) fn of(payload: &[u8]) -> Option<Self> {
        payload.get(1).copied().and_then(Self::from_byte)
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Open, Self::ToServer, Self::ToClient, Self::Probe, Self::Who, Self::Locate, Self::Void]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// Who says something, and about which call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub kind: Kind,
    pub node: NodeId,
    /// How often the sender has lost its connection: what it was sent before is gone.
    pub epoch: u32,
    pub call: u64,
    /// `None` on control messages.
    pub sequence: Option<u32>,
}

impl Header {
    pub(crate) fn encode(&self, buffer: &mut BytesMut) {
        buffer.put_u8(VERSION);
        buffer.put_u8(self.kind as u8);
        buffer.put_slice(&self.node.0);
        buffer.put_u32(self.epoch);
        buffer.put_u64(self.call);
        buffer.put_u32(self.sequence.unwrap_or(UNNUMBERED));
    }

    /// A whole message: this header and nothing but `frames`.
    pub(crate) fn message(&self, frames: &[Frame]) -> Bytes {
        let mut buffer = BytesMut::with_capacity(HEADER_BYTES + 64);
        self.encode(&mut buffer);
        for frame in frames {
            frame.encode(&mut buffer);
        }
        buffer.freeze()
    }
}

/// A part of a call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Frame {
    /// The head of the request or response, encoded by `head.rs`.
    Head(Bytes),
    /// A piece of the body. Pieces have nothing to do with gRPC messages.
    Data(Bytes),
    /// The trailers, encoded by `head.rs`: the end of a response.
    Trailers(Bytes),
    /// The end of a body without trailers.
    End,
    /// The receiver takes so many charged bytes in all, counted from the start of the call.
    Credit(u64),
    /// The caller has lost interest.
    Cancel,
    /// The sender does not go on with the call.
    Reset(Refusal),
    /// Call ids, eight bytes each, in a [`Kind::Who`].
    Calls(Bytes),
    /// JSON in the answer to a [`Kind::Locate`].
    Instance(Bytes),
}

/// A status without its metadata, as far as a [`Frame::Reset`] carries it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Refusal {
    pub code: Code,
    pub message: Bytes,
}

impl From<&Status> for Refusal {
    fn from(status: &Status) -> Self {
        Self { code: status.code(), message: Bytes::copy_from_slice(status.message().as_bytes()) }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Status::new(refusal.code, String::from_utf8_lossy(&refusal.message))
    }
}

impl Frame {
    pub(crate) fn encode(&self, buffer: &mut BytesMut) {
        let (kind, bytes) = match self {
            Self::Head(bytes) => (1, bytes),
            Self::Data(bytes) => (2, bytes),
            Self::Trailers(bytes) => (3, bytes),
            Self::End => (4, &Bytes::new()),
            Self::Credit(limit) => return put(buffer, 5, &limit.to_be_bytes()),
            Self::Cancel => (6, &Bytes::new()),
            Self::Reset(refusal) => {
                buffer.put_u8(7);
                buffer.put_u32(length(1 + refusal.message.len()));
                // The seventeen codes of gRPC fit a byte.
                buffer.put_u8(i32::from(refusal.code) as u8);
                return buffer.put_slice(&refusal.message);
            }
            Self::Calls(bytes) => (8, bytes),
            Self::Instance(bytes) => (9, bytes),
        };
        put(buffer, kind, bytes);
    }

    /// A [`Frame::Head`] with the content that `write` appends.
    pub(crate) fn encode_head(buffer: &mut BytesMut, write: impl FnOnce(&mut BytesMut)) {
        buffer.put_u8(1);
        buffer.put_u32(0);
        let start = buffer.len();
        write(buffer);
        let bytes = length(buffer.len() - start);
        buffer[start - 4..start].copy_from_slice(&bytes.to_be_bytes());
    }

    fn decode(kind: u8, mut bytes: Bytes) -> Result<Self, Malformed> {
        Ok(match kind {
            1 => Self::Head(bytes),
            2 => Self::Data(bytes),
            3 => Self::Trailers(bytes),
            4 => Self::End,
            5 => Self::Credit(bytes.try_get_u64().map_err(|_| Malformed("a credit frame is too short"))?),
            6 => Self::Cancel,
            7 => {
                let code = bytes.try_get_u8().map_err(|_| Malformed("a reset frame is empty"))?;
                Self::Reset(Refusal { code: Code::from(i32::from(code)), message: bytes })
            }
            8 => Self::Calls(bytes),
            9 => Self::Instance(bytes),
            _ => return Err(Malformed("a frame is of an unknown kind")),
        })
    }

    /// Whether the frame is worth an answer when nobody knows its call.
    pub(crate) fn is_content(&self) -> bool {
        matches!(self, Self::Head(_) | Self::Data(_) | Self::Trailers(_) | Self::End)
    }
}

fn put(buffer: &mut BytesMut, kind: u8, bytes: &[u8]) {
    buffer.put_u8(kind);
    buffer.put_u32(length(bytes.len()));
    buffer.put_slice(bytes);
}

/// Frames are parts of one NATS message, which is far shorter than 4 GiB.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// Why a message cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a peer sent a malformed message: {0}")]
pub(crate) struct Malformed(pub &'static str);

impl From<Malformed> for Status {
    fn from(malformed: Malformed) -> Self {
        Status::internal(malformed.to_string())
    }
}

/// A decoded message.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Message {
    pub header: Header,
    pub frames: Vec<Frame>,
}

impl Message {
    /// Takes `payload` apart without copying it.
    pub(crate) fn decode(payload: Bytes) -> Result<Self, Malformed> {
        let (header, frames) = Self::decode_header(payload)?;
        Ok(Self { header, frames: decode_frames(frames)? })
    }

    /// The header, and the frames still encoded.
    pub(crate) fn decode_header(mut payload: Bytes) -> Result<(Header, Bytes), Malformed> {
        if payload.len() < HEADER_BYTES {
            return Err(Malformed("it is shorter than a header"));
        }
        if payload.get_u8() != VERSION {
            return Err(Malformed("it is of another version"));
        }
        let kind = Kind::from_byte(payload.get_u8()).ok_or(Malformed("it is of an unknown kind"))?;
        let node = payload.split_to(NODE_ID_BYTES);
        let node = std::str::from_utf8(&node).ok().and_then(NodeId::parse).ok_or(Malformed("its sender has no name"))?;
        let epoch = payload.get_u32();
        let call = payload.get_u64();
        let sequence = Some(payload.get_u32()).filter(|number| *number != UNNUMBERED);
        Ok((Header { kind, node, epoch, call, sequence }, payload))
    }
}

fn decode_frames(mut bytes: Bytes) -> Result<Vec<Frame>, Malformed> {
    let mut frames = Vec::with_capacity(4);
    while bytes.has_remaining() {
        let kind = bytes.get_u8();
        let length = bytes.try_get_u32().map_err(|_| Malformed("it ends inside a frame's header"))? as usize;
        if length > bytes.len() {
            return Err(Malformed("it ends inside a frame"));
        }
        frames.push(Frame::decode(kind, bytes.split_to(length))?);
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        let node = NodeId::parse("0123456789abcdefghijKL").unwrap();
        Header { kind: Kind::Open, node, epoch: 7, call: u64::MAX - 1, sequence: Some(3) }
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from);
        prop_oneof![
            bytes().prop_map(Frame::Head),
            bytes().prop_map(Frame::Data),
            bytes().prop_map(Frame::Trailers),
            Just(Frame::End),
            any::<u64>().prop_map(Frame::Credit),
            Just(Frame::Cancel),
            (0..17i32, bytes()).prop_map(|(code, message)| Frame::Reset(Refusal { code: Code::from(code), message })),
            bytes().prop_map(Frame::Calls),
            bytes().prop_map(Frame::Instance),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(frames in prop::collection::vec(frame(), 0..8), sequence in prop::option::of(0..u32::MAX)) {
            let header = Header { sequence, ..header() };
            let message = Message::decode(header.message(&frames)).unwrap();
            prop_assert_eq!(message, Message { header, frames });
        }

        #[test]
        fn garbage_is_an_error_or_a_message_but_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = Message::decode(Bytes::from(bytes));
        }

        #[test]
        fn garbage_after_a_good_header_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut payload = header().message(&[]).to_vec();
            payload.extend(bytes);
            let _ = Message::decode(Bytes::from(payload));
        }

        #[test]
        fn a_message_cut_short_is_refused_or_lacks_frames(frames in prop::collection::vec(frame(), 1..5), at in any::<prop::sample::Index>()) {
            let whole = header().message(&frames);
            let cut = whole.slice(..at.index(whole.len()));
            if let Ok(message) = Message::decode(cut) {
                prop_assert!(message.frames.len() < frames.len());
            }
        }
    }

    #[test]
    fn another_version_is_refused() {
        let mut payload = header().message(&[]).to_vec();
        payload[0] = VERSION + 1;
        assert_eq!(Message::decode(payload.into()), Err(Malformed("it is of another version")));
    }
}
