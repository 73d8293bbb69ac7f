//! Every string, conversation and prompt of the stored reference outputs, exactly.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use checkpoint::Checkpoint;
use domain::{Input, Message, OutputKind, Part, Role};
use serde_json::Value;
use text::{PreparedSegment, TextCodec};

const KINDS: [&str; 6] = ["llm", "v2", "v25", "coder", "vl", "janus"];

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures")).join(name)
}

fn golden(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("golden.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn parts(content: &Value) -> Vec<Part> {
    let part = |part: &Value| match part["type"].as_str().unwrap() {
        "image" => Part::Image(Bytes::new()),
        _ => Part::Text(part["text"].as_str().unwrap().to_owned()),
    };
    match content.as_str() {
        Some(text) => vec![Part::Text(text.to_owned())],
        None => content.as_array().unwrap().iter().map(part).collect(),
    }
}

fn messages(value: &Value) -> Vec<Message> {
    let role = |role: &Value| match role.as_str().unwrap() {
        "system" => Role::System,
        "user" => Role::User,
        _ => Role::Assistant,
    };
    value.as_array().unwrap().iter().map(|message| Message { role: role(&message["role"]), parts: parts(&message["content"]) }).collect()
}

/// The prompt with `rows` placeholder ids in every slot, as the reference's processor expands it.
fn expanded(segments: &[PreparedSegment], placeholder: u32, rows: usize) -> Vec<u32> {
    let ids = |segment: &PreparedSegment| match segment {
        PreparedSegment::Tokens(ids) => ids.clone(),
        PreparedSegment::Image(_) => vec![placeholder; rows],
    };
    segments.iter().flat_map(ids).collect()
}

#[test]
fn strings_encode_and_decode_as_the_reference_does() {
    let mut compared = 0;
    for kind in KINDS {
        let dir = fixture("tokenizers").join(kind);
        let (codec, golden) = (TextCodec::load_dir(&dir).unwrap(), golden(&dir));
        assert_eq!(codec.vocabulary_size() as u64, golden["vocab_size_with_added"].as_u64().unwrap(), "{kind}");
        assert_eq!(codec.eos_token_ids(), [golden["eos_id"].as_u64().unwrap() as u32], "{kind}");
        for string in golden["strings"].as_array().unwrap() {
            let text = string["text"].as_str().unwrap();
            assert_eq!(codec.encode(text, false), ids(&string["ids"]), "{kind}: {text:?}");
            assert_eq!(codec.encode(text, true), ids(&string["ids_with_bos"]), "{kind}: {text:?}");
            assert_eq!(codec.decode(&ids(&string["ids"]), false), string["decoded"].as_str().unwrap(), "{kind}: {text:?}");
            assert_eq!(codec.decode(&ids(&string["ids"]), true), string["decoded_skip_special"].as_str().unwrap(), "{kind}: {text:?}");
            let mut stream = codec.detokenizer(vec![]);
            let streamed: String = ids(&string["ids"]).iter().map(|id| stream.push(&[*id]).text).collect();
            assert_eq!(streamed + &stream.finish().text, string["decoded_skip_special"].as_str().unwrap(), "{kind}: {text:?}");
            compared += 1;
        }
    }
    assert_eq!(compared, 1200);
}

#[test]
fn conversations_render_and_encode_as_the_reference_does() {
    let mut compared = 0;
    for kind in KINDS {
        let dir = fixture("tokenizers").join(kind);
        let (codec, golden) = (TextCodec::load_dir(&dir).unwrap(), golden(&dir));
        for chat in golden["chat"].as_array().unwrap() {
            let messages = messages(&chat["messages"]);
            let reply = chat["add_generation_prompt"].as_bool().unwrap();
            let text = codec.render(&messages, reply).unwrap();
            assert_eq!(text, chat["text"].as_str().unwrap(), "{kind}");
            assert_eq!(codec.encode(&text, false), ids(&chat["ids"]), "{kind}: {text:?}");
            compared += 1;
            if !reply {
                continue;
            }
            // What is sent to the model: BOS exactly once, pictures as slots.
            let mut expected = ids(&chat["ids"]);
            let bos = golden["bos_id"].as_u64().unwrap() as u32;
            if expected[0] != bos {
                expected.insert(0, bos);
            }
            let placeholder = codec.token_id("<image_placeholder>").unwrap_or(u32::MAX);
            if let Some(begin) = codec.token_id("<begin_of_image>") {
                let end = codec.token_id("<end_of_image>").unwrap();
                expected = expected.into_iter().flat_map(|id| if id == placeholder { vec![begin, id, end] } else { vec![id] }).collect();
            }
            let prepared = codec.prepare(&Input::Chat(messages), OutputKind::Text).unwrap();
            assert_eq!(expanded(&prepared.segments, placeholder, 1), expected, "{kind}: {text:?}");
            assert_eq!(prepared.unconditional, []);
        }
    }
    assert_eq!(compared, 54);
}

#[test]
fn fill_in_the_middle_texts_encode_as_the_reference_does() {
    let mut compared = 0;
    for kind in KINDS {
        let dir = fixture("tokenizers").join(kind);
        let (codec, golden) = (TextCodec::load_dir(&dir).unwrap(), golden(&dir));
        if let Some(text) = golden["fim"]["text"].as_str() {
            let expected = ids(&golden["fim"]["ids_with_bos"]);
            let input = Input::Completion { parts: vec![Part::Text(text.to_owned())], bos: true };
            assert_eq!(codec.encode(text, true), expected, "{kind}");
            assert_eq!(codec.prepare(&input, OutputKind::Text).unwrap().segments, [PreparedSegment::Tokens(expected)], "{kind}");
            compared += 1;
        }
    }
    assert_eq!(compared, 4);
}

#[test]
fn prompts_of_the_language_models_begin_with_bos() {
    for name in ["llama", "llama_gqa", "moe_v1", "v2_lite", "v2_full"] {
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let codec = TextCodec::load(&checkpoint).unwrap();
        for prompt in golden(checkpoint.dir())["prompts"].as_array().unwrap() {
            let expected = ids(&prompt["input_ids"]);
            let input = match prompt["messages"].is_null() {
                true => Input::Completion { parts: vec![Part::Text(prompt["prompt"].as_str().unwrap().to_owned())], bos: true },
                false => Input::Chat(messages(&prompt["messages"])),
            };
            assert_eq!(codec.prepare(&input, OutputKind::Text).unwrap().segments, [PreparedSegment::Tokens(expected)], "{name}");
            assert_eq!(codec.decode(&ids(&prompt["generated_ids"]), false), prompt["generated_text"].as_str().unwrap(), "{name}");
        }
    }
}

#[test]
fn prompts_of_janus_have_their_pictures_framed() {
    let checkpoint = Checkpoint::open(&fixture("janus")).unwrap();
    let (codec, golden) = (TextCodec::load(&checkpoint).unwrap(), golden(checkpoint.dir()));
    let placeholder = golden["special_ids"]["image"].as_u64().unwrap() as u32;
    let rows = golden["num_image_tokens"].as_u64().unwrap() as usize;
    for prompt in golden["prompts"].as_array().unwrap() {
        let expected = ids(&prompt["input_ids"]);
        let prepared = codec.prepare(&Input::Chat(messages(&prompt["messages"])), OutputKind::Text).unwrap();
        assert_eq!(expanded(&prepared.segments, placeholder, rows), expected);
        assert_eq!(prepared.eos_token_ids, [golden["special_ids"]["eos"].as_u64().unwrap() as u32]);
        // The same prompt as a completion with the picture where the placeholder stands.
        let (before, after) = prompt["text"].as_str().unwrap().split_once("<image_placeholder>").unwrap();
        let parts = vec![Part::Text(before.into()), Part::Image(Bytes::new()), Part::Text(after.into())];
        let completion = codec.prepare(&Input::Completion { parts, bos: true }, OutputKind::Text).unwrap();
        assert_eq!(completion.segments, prepared.segments);
    }
}

#[test]
fn prompts_of_deepseek_vl_hold_their_pictures_in_order() {
    for name in ["deepseek_vl", "deepseek_vl_hybrid"] {
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let (codec, golden) = (TextCodec::load(&checkpoint).unwrap(), golden(checkpoint.dir()));
        let placeholder = golden["image_token_id"].as_u64().unwrap() as u32;
        let rows = golden["num_image_tokens"].as_u64().unwrap() as usize;
        for prompt in golden["prompts"].as_array().unwrap() {
            let messages = messages(&prompt["messages"]);
            assert_eq!(codec.render(&messages, true).unwrap(), prompt["text"].as_str().unwrap(), "{name}");
            let prepared = codec.prepare(&Input::Chat(messages), OutputKind::Text).unwrap();
            assert_eq!(expanded(&prepared.segments, placeholder, rows), ids(&prompt["input_ids"]), "{name}");
            let slots: Vec<_> = prepared.segments.iter().filter(|segment| matches!(segment, PreparedSegment::Image(_))).collect();
            let expected: Vec<_> = (0..prompt["images"].as_array().unwrap().len() as u32).map(PreparedSegment::Image).collect();
            assert_eq!(slots, expected.iter().collect::<Vec<_>>(), "{name}");
        }
    }
}

#[test]
fn prompts_for_images_come_with_their_guidance_pair() {
    let dir = fixture("janus");
    let codec = TextCodec::load(&Checkpoint::open(&dir).unwrap()).unwrap();
    let tensors = fs::read(dir.join("golden.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&tensors).unwrap();
    let stored = |name: &str| -> Vec<u32> {
        tensors.tensor(name).unwrap().data().chunks_exact(4).map(|id| u32::from_le_bytes(id.try_into().unwrap())).collect()
    };
    let golden = golden(&dir);
    for (number, drawing) in golden["text_to_image"].as_array().unwrap().iter().enumerate() {
        let text = drawing["text"].as_str().unwrap();
        let content = text.strip_prefix("<|User|>: ").unwrap().split_once("\n\n<|Assistant|>:").unwrap().0;
        let chat = Input::Chat(vec![Message { role: Role::User, parts: vec![Part::Text(format!(" {content}\n"))] }]);
        let whole = |text: &str| Input::Completion { parts: vec![Part::Text(text.to_owned())], bos: true };
        for input in [chat, whole(text), whole(text.strip_suffix("<begin_of_image>").unwrap())] {
            let prepared = codec.prepare(&input, OutputKind::Image).unwrap();
            assert_eq!(prepared.segments, [PreparedSegment::Tokens(ids(&drawing["cond_ids"]))], "{input:?}");
            assert_eq!(prepared.segments, [PreparedSegment::Tokens(stored(&format!("t2i{number}.cond_ids")))]);
            assert_eq!(prepared.unconditional, [PreparedSegment::Tokens(stored(&format!("t2i{number}.uncond_ids")))]);
        }
    }
}

#[test]
fn long_texts_encode_as_in_one_piece() {
    for (kind, end) in [("llm", "\n"), ("janus", "\r\n"), ("janus", "  \n\n "), ("coder", " \n"), ("vl", "\r"), ("v2", ". ")] {
        let dir = fixture("tokenizers").join(kind);
        let (codec, golden) = (TextCodec::load_dir(&dir).unwrap(), golden(&dir));
        let reference = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        let strings: Vec<&str> = golden["strings"].as_array().unwrap().iter().map(|string| string["text"].as_str().unwrap()).collect();
        let text = strings.join(end).repeat(20);
        assert!(text.len() > 100 * 1024, "{} bytes", text.len());
        let expected = reference.encode_fast(text.as_str(), false).unwrap();
        assert!(codec.encode(&text, false) == expected.get_ids(), "{kind} {end:?}");
    }
}
