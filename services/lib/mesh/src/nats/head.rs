//! Heads and trailers as bytes: `path length u16 · path` or `HTTP status u16`, then headers as
//! `count u16`, each `name length u16 · name · value length u32 · value`. Values may be any bytes that HTTP allows, so binary
//! metadata travels as it is. The headers that nearly every call has are two bytes instead: [`COMMON`] plus their place in a list.
//!
//! Decoding copies names and values: a handler may keep them for long, and a slice would keep the whole read buffer it lies in.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};

use super::frame::Malformed;

/// Put in place of a name's length, which is shorter.
const COMMON: u16 = 0xFF00;
/// Only ever appended to: both sides must agree.
static COMMON_HEADERS: [(HeaderName, &str); 4] = [
    (http::header::CONTENT_TYPE, "application/grpc"),
    (http::header::TE, "trailers"),
    (HeaderName::from_static("grpc-status"), "0"),
    (HeaderName::from_static("grpc-accept-encoding"), "identity"),
];

pub(crate) fn encode_request(buffer: &mut BytesMut, path: &str, headers: &HeaderMap) {
    buffer.put_u16(u16::try_from(path.len()).unwrap_or(u16::MAX));
    buffer.put_slice(path.as_bytes());
    put_headers(buffer, headers);
}

pub(crate) fn encode_response(buffer: &mut BytesMut, status: StatusCode, headers: &HeaderMap) {
    buffer.put_u16(status.as_u16());
    put_headers(buffer, headers);
}

pub(crate) fn encode_trailers(headers: &HeaderMap) -> Bytes {
    let mut buffer = BytesMut::with_capacity(64);
    put_headers(&mut buffer, headers);
    buffer.freeze()
}

/// A request with nothing in its body yet.
pub(crate) fn decode_request(mut bytes: Bytes) -> Result<http::Request<()>, Malformed> {
    let length = bytes.try_get_u16().map_err(|_| Malformed("its head is too short"))? as usize;
    let path = take(&mut bytes, length)?;
    let uri = Uri::try_from(&path[..]).map_err(|_| Malformed("its path is no path"))?;
    let mut request = http::Request::new(());
    *request.method_mut() = http::Method::POST;
    *request.version_mut() = http::Version::HTTP_2;
    *request.uri_mut() = uri;
    *request.headers_mut() = decode_trailers(bytes)?;
    Ok(request)
}

pub(crate) fn decode_response(mut bytes: Bytes) -> Result<http::Response<()>, Malformed> {
    let status = bytes.try_get_u16().map_err(|_| Malformed("its head is too short"))?;
    let mut response = http::Response::new(());
    *response.status_mut() = StatusCode::from_u16(status).map_err(|_| Malformed("its HTTP status is none"))?;
    *response.version_mut() = http::Version::HTTP_2;
    *response.headers_mut() = decode_trailers(bytes)?;
    Ok(response)
}

pub(crate) fn decode_trailers(mut bytes: Bytes) -> Result<HeaderMap, Malformed> {
    let count = bytes.try_get_u16().map_err(|_| Malformed("its headers are too short"))?;
    let mut headers = HeaderMap::new();
    for _ in 0..count {
        let length = bytes.try_get_u16().map_err(|_| Malformed("it ends inside a header"))?;
        if let Some(place) = length.checked_sub(COMMON) {
            let (name, value) = COMMON_HEADERS.get(usize::from(place)).ok_or(Malformed("a header is not known"))?;
            headers.try_append(name, HeaderValue::from_static(value)).map_err(|_| Malformed("it has too many headers"))?;
            continue;
        }
        let name = take(&mut bytes, usize::from(length))?;
        let name = HeaderName::from_bytes(&name).map_err(|_| Malformed("a header has an illegal name"))?;
        let length = bytes.try_get_u32().map_err(|_| Malformed("it ends inside a header"))? as usize;
        let value = take(&mut bytes, length)?;
        let value = HeaderValue::from_bytes(&value).map_err(|_| Malformed("a header has an illegal value"))?;
        headers.try_append(name, value).map_err(|_| Malformed("it has too many headers"))?;
    }
    Ok(headers)
}

fn put_headers(buffer: &mut BytesMut, headers: &HeaderMap) {
    // `HeaderMap` itself holds at most 2^15 values.
    buffer.put_u16(u16::try_from(headers.len()).unwrap_or(u16::MAX));
    for (name, value) in headers {
        if let Some(place) = COMMON_HEADERS.iter().position(|(common, text)| common == name && value == text) {
            buffer.put_u16(COMMON + place as u16);
            continue;
        }
        let name = name.as_str().as_bytes();
        buffer.put_u16(u16::try_from(name.len()).unwrap_or(u16::MAX));
        buffer.put_slice(name);
        buffer.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
        buffer.put_slice(value.as_bytes());
    }
}

fn take(bytes: &mut Bytes, length: usize) -> Result<Bytes, Malformed> {
    if length > bytes.len() {
        return Err(Malformed("it ends inside a header"));
    }
    Ok(bytes.split_to(length))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn headers() -> impl Strategy<Value = HeaderMap> {
        let value = prop::collection::vec(any::<u8>().prop_filter("legal in a value", |byte| *byte >= 32 && *byte != 127), 0..50);
        prop::collection::vec(("[a-z][a-z0-9-]{0,20}", value), 0..10).prop_map(|entries| {
            let mut headers = HeaderMap::new();
            for (name, value) in entries {
                headers.append(HeaderName::try_from(name).unwrap(), HeaderValue::from_bytes(&value).unwrap());
            }
            headers
        })
    }

    #[test]
    fn common_headers_are_short_and_survive() {
        let headers: HeaderMap = COMMON_HEADERS.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect();
        let bytes = encode_trailers(&headers);
        assert_eq!(bytes.len(), 2 + 2 * headers.len());
        assert_eq!(decode_trailers(bytes).unwrap(), headers);
    }

    proptest! {
        #[test]
        fn heads_survive(headers in headers(), path in "/[a-zA-Z.]{1,30}/[a-zA-Z]{1,20}") {
            let mut bytes = BytesMut::new();
            encode_request(&mut bytes, &path, &headers);
            let request = decode_request(bytes.split().freeze()).unwrap();
            prop_assert_eq!(request.uri().path(), path);
            prop_assert_eq!(request.headers(), &headers);
            encode_response(&mut bytes, StatusCode::OK, &headers);
            let response = decode_response(bytes.freeze()).unwrap();
            prop_assert_eq!(response.headers(), &headers);
            prop_assert_eq!(decode_trailers(encode_trailers(&headers)).unwrap(), headers);
        }

        #[test]
        fn garbage_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let bytes = Bytes::from(bytes);
            let _ = decode_request(bytes.clone());
            let _ = decode_response(bytes.clone());
            let _ = decode_trailers(bytes);
        }
    }
}
