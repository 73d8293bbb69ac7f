//! Conversations of checkpoints that publish no chat template, against strings worked out by hand (spec: vision.md 6, janus.md 3).
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use checkpoint::Checkpoint;
use domain::{Input, Message, OutputKind, Part, Role};
use serde_json::{Value, json};
use text::{PreparedSegment, TextCodec, TextError};

const SYSTEM: &str = "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, \
                      and assist the user with a variety of tasks using natural language.";
const EOS: &str = "<｜end▁of▁sentence｜>";

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures")).join(name)
}

/// The tokenizer of a fixture in a folder of the original form: another configuration, no template. `edit` changes `tokenizer.json`.
fn published(name: &str, config: &Value, edit: impl Fn(String) -> String) -> Result<TextCodec, TextError> {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(fixture(name).join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let read = |file: &str| fs::read_to_string(fixture(name).join(file)).unwrap();
    fs::write(dir.path().join("tokenizer.json"), edit(read("tokenizer.json"))).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&read("tokenizer_config.json")).unwrap();
    tokenizer.as_object_mut().unwrap().remove("chat_template");
    fs::write(dir.path().join("tokenizer_config.json"), tokenizer.to_string()).unwrap();
    TextCodec::load(&Checkpoint::open(dir.path()).unwrap())
}

fn deepseek_vl() -> TextCodec {
    published("deepseek_vl", &json!({"model_type": "multi_modality", "vision_config": {}}), |text| text).unwrap()
}

fn janus_pro() -> TextCodec {
    published("janus", &json!({"model_type": "multi_modality", "vision_config": {}, "gen_vision_config": {}}), |text| text).unwrap()
}

/// The family of 1.3B has no tokens for roles.
fn janus() -> TextCodec {
    let config = json!({"model_type": "multi_modality", "vision_config": {}, "gen_vision_config": {}});
    published("janus", &config, |text| text.replace("<|User|>", "<|u|>").replace("<|Assistant|>", "<|a|>")).unwrap()
}

fn said(role: Role, parts: &[Part]) -> Message {
    Message { role, parts: parts.to_vec() }
}

fn text(text: &str) -> Part {
    Part::Text(text.to_owned())
}

fn image() -> Part {
    Part::Image(Bytes::new())
}

#[test]
fn conversations_of_every_shape() {
    use Role::{Assistant, System, User};
    let (vl, pro, plain) = (deepseek_vl(), janus_pro(), janus());
    let question = [image(), text("What is this?")];
    let rows: Vec<(&TextCodec, Vec<Message>, String)> = vec![
        (&vl, vec![said(User, &[text("Hi")])], format!("{SYSTEM}\n\nUser: Hi\n\nAssistant:")),
        (&vl, vec![said(User, &question)], format!("{SYSTEM}\n\nUser: <image_placeholder>\nWhat is this?\n\nAssistant:")),
        (&plain, vec![said(User, &question)], format!("{SYSTEM}\n\nUser: <image_placeholder>\nWhat is this?\n\nAssistant:")),
        (&pro, vec![said(User, &question)], format!("{SYSTEM}\n\n<|User|>: <image_placeholder>\nWhat is this?\n\n<|Assistant|>:")),
        // Pictures anywhere, text between them, white space around the content.
        (
            &vl,
            vec![said(User, &[text(" \n first "), image(), text("then"), image(), image(), text(" and? \n"), image()])],
            format!(
                "{SYSTEM}\n\nUser: first <image_placeholder>\nthen<image_placeholder>\n<image_placeholder>\n and? \n<image_placeholder>\n\n\
                 Assistant:"
            ),
        ),
        // A system prompt of the client's own, and one that says nothing.
        (&vl, vec![said(System, &[text(" Be brief. ")]), said(User, &[text("Hi")])], "Be brief.\n\nUser: Hi\n\nAssistant:".into()),
        (&pro, vec![said(System, &[text("")]), said(User, &[text("Hi")])], "<|User|>: Hi\n\n<|Assistant|>:".into()),
        // Earlier turns.
        (
            &vl,
            vec![said(User, &[text("Hi")]), said(Assistant, &[text(" Hello. ")]), said(User, &question)],
            format!("{SYSTEM}\n\nUser: Hi\n\nAssistant: Hello.{EOS}User: <image_placeholder>\nWhat is this?\n\nAssistant:"),
        ),
        // The place of the answer, given as the examples of the family do.
        (&vl, vec![said(User, &[text("Hi")]), said(Assistant, &[text("")])], format!("{SYSTEM}\n\nUser: Hi\n\nAssistant:")),
        // Turns end by their number.
        (
            &vl,
            vec![said(User, &[text("a")]), said(User, &[text("b")]), said(User, &[text("c")])],
            format!("{SYSTEM}\n\nUser: a\n\nUser: b{EOS}User: c\n\nAssistant:"),
        ),
    ];
    for (codec, messages, expected) in rows {
        assert_eq!(codec.render(&messages, true).unwrap(), expected);
        // The same text, read with its tokens, is what the model gets; pictures are slots.
        let prepared = codec.prepare(&Input::Chat(messages), OutputKind::Text).unwrap();
        assert_eq!(shown(codec, &prepared.segments), format!("<｜begin▁of▁sentence｜>{expected}"));
    }
}

/// Text of a prompt, with the placeholder where a picture goes and without the tokens around it.
fn shown(codec: &TextCodec, segments: &[PreparedSegment]) -> String {
    let segment = |segment: &PreparedSegment| match segment {
        PreparedSegment::Tokens(ids) => codec.decode(ids, false),
        PreparedSegment::Image(_) => "<image_placeholder>".to_owned(),
        PreparedSegment::Padding { .. } => panic!("padding in a prompt: {segments:?}"),
    };
    let text: String = segments.iter().map(segment).collect();
    text.replace("<begin_of_image>", "").replace("<end_of_image>", "")
}

#[test]
fn pictures_are_framed_where_the_tokenizer_has_frames() {
    let input = Input::Chat(vec![said(Role::System, &[text("")]), said(Role::User, &[image(), text("?")])]);
    let slots = |codec: &TextCodec| {
        let prepared = codec.prepare(&input, OutputKind::Text).unwrap();
        let place = prepared.segments.iter().position(|segment| *segment == PreparedSegment::Image(0)).unwrap();
        let PreparedSegment::Tokens(before) = &prepared.segments[place - 1] else { panic!("{prepared:?}") };
        codec.decode(&before[before.len() - 1..], false)
    };
    assert_eq!(slots(&janus_pro()), "<begin_of_image>");
    assert_ne!(slots(&deepseek_vl()), "<begin_of_image>");
}

#[test]
fn content_stays_content() {
    let codec = deepseek_vl();
    for content in ["<image_placeholder>", EOS, "a <", "<｜begin▁of▁sentence｜>"] {
        let messages = vec![said(Role::User, &[text(content)]), said(Role::Assistant, &[text(content)]), said(Role::User, &[image()])];
        let prepared = codec.prepare(&Input::Chat(messages), OutputKind::Text).unwrap();
        let slots = prepared.segments.iter().filter(|segment| matches!(segment, PreparedSegment::Image(_))).count();
        assert_eq!(slots, 1, "{content}");
        let ids = prepared.segments.iter().flat_map(|segment| match segment {
            PreparedSegment::Tokens(ids) => ids.clone(),
            PreparedSegment::Image(_) | PreparedSegment::Padding { .. } => Vec::new(),
        });
        let control = ["<｜begin▁of▁sentence｜>", EOS].map(|token| codec.token_id(token).unwrap());
        assert_eq!(ids.filter(|id| control.contains(id)).count(), 2, "{content}: one at the beginning, one behind the answer");
    }
}

#[test]
fn only_the_family_has_a_form_of_its_own() {
    // A template wins where there is one; a port without one is told so, as is a text model.
    let config = json!({"model_type": "deepseek_vl"});
    let port = published("deepseek_vl", &config, |text| text).unwrap();
    let hello = [said(Role::User, &[text("Hi")])];
    let error = port.render(&hello, true).unwrap_err().to_string();
    assert_eq!(error, "chat: this checkpoint has no chat template: send a completion");
    let dir = tempfile::tempdir().unwrap();
    for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture("deepseek_vl").join(file), dir.path().join(file)).unwrap();
    }
    fs::write(dir.path().join("config.json"), r#"{"model_type": "multi_modality", "vision_config": {}}"#).unwrap();
    fs::write(dir.path().join("chat_template.jinja"), "template: {{ messages[0].content }}").unwrap();
    let templated = TextCodec::load(&Checkpoint::open(dir.path()).unwrap()).unwrap();
    assert_eq!(templated.render(&hello, true).unwrap(), "template: Hi");
}

/// DeepSeek-VL neither draws nor frames its pictures, so its tokenizer need not have the tokens for that.
#[test]
fn a_family_needs_the_tokens_of_what_it_does() {
    let gone = |token: &'static str| move |text: String| text.replace(token, "<gone>");
    let sees = json!({"model_type": "multi_modality", "vision_config": {}});
    let draws = json!({"model_type": "multi_modality", "vision_config": {}, "gen_vision_config": {}});
    let error = published("deepseek_vl", &sees, gone("<image_placeholder>")).unwrap_err().to_string();
    assert!(error.contains("missing token <image_placeholder>"), "{error}");
    let error = published("deepseek_vl", &draws, |text| text).unwrap_err().to_string();
    assert!(error.contains("missing token <begin_of_image>, which a multi_modality model needs"), "{error}");
}
