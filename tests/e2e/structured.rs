//! Text that must look a certain way, and text that fills a gap, through the public door.

use proto::v1;
use proto::v1::constraint::Constraint::{JsonSchema, Lark, Regex};
use proto::v1::generate_request::Input;
use tests::request::{chat, completion, for_text, greedy, text};
use tests::{Answer, Wire, World};

const SCHEMA: &str = r#"{
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 10}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["word", "count"],
    "additionalProperties": false
}"#;

fn constrained(constraint: v1::constraint::Constraint, seed: u64) -> v1::Sampling {
    v1::Sampling {
        temperature: Some((seed % 2) as f32),
        seed: Some(seed),
        max_tokens: Some(1000),
        constraint: Some(v1::Constraint { constraint: Some(constraint) }),
        ..v1::Sampling::default()
    }
}

fn is_word_and_count(text: &str) -> bool {
    let value: serde_json::Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    let (word, count) = (value["word"].as_str().unwrap(), value["count"].as_i64().unwrap());
    value.as_object().unwrap().len() == 2 && word.chars().count() <= 10 && (0..10).contains(&count)
}

#[tokio::test(flavor = "multi_thread")]
async fn constraints_hold_in_process() {
    constraints_hold(Wire::InProcess).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn constraints_hold_over_nats() {
    constraints_hold(Wire::Nats).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn constraints_hold_over_direct() {
    constraints_hold(Wire::Direct).await;
}

async fn constraints_hold(wire: Wire) {
    let world = World::start(wire, &["llama", "janus"]).await;
    let grammar = "start: (\"left\" | \"right\") (\", then \" (\"left\" | \"right\")){1,3} \".\"";
    let is_way = |text: &str| {
        let turns: Vec<&str> = text.strip_suffix('.').unwrap().split(", then ").collect();
        (2..=4).contains(&turns.len()) && turns.iter().all(|turn| ["left", "right"].contains(turn))
    };
    let is_code = |text: &str| text.len() == 5 && text[..2].bytes().all(|b| b.is_ascii_uppercase()) && text[2..].parse::<u32>().is_ok();
    type Row<'a> = (v1::constraint::Constraint, &'a (dyn Fn(&str) -> bool + Sync));
    let rows: [Row<'_>; 3] =
        [(JsonSchema(SCHEMA.into()), &is_word_and_count), (Regex("[A-Z]{2}[0-9]{3}".into()), &is_code), (Lark(grammar.into()), &is_way)];
    for model in ["llama", "janus"] {
        for (constraint, holds) in &rows {
            for seed in 0..4 {
                let request = for_text(model, chat(vec![text("Tell me.")]), constrained(constraint.clone(), seed));
                let answer = world.ask(request).await.unwrap();
                assert!(holds(answer.text()), "{model}: {:?}", answer.text());
                assert_eq!(answer.reasons[&0], v1::FinishReason::Stop, "{model}: {:?}", answer.text());
            }
        }
    }
    world.stop().await;
}

/// Every choice has a place of its own in the grammar, and is what it would be alone.
#[tokio::test(flavor = "multi_thread")]
async fn choices_are_constrained_one_by_one() {
    let world = World::start(Wire::InProcess, &["janus"]).await;
    let ask = async |seed, n| -> Answer {
        let sampling = v1::Sampling { n: Some(n), temperature: Some(1.0), ..constrained(JsonSchema(SCHEMA.into()), seed) };
        world.ask(for_text("janus", completion(vec![text("A thing: ")]), sampling)).await.unwrap()
    };
    let four = ask(20, 4).await;
    for choice in 0..4 {
        assert!(is_word_and_count(&four.texts[&choice]), "{:?}", four.texts[&choice]);
        assert_eq!(four.ids[&choice], ask(20 + u64::from(choice), 1).await.ids(), "choice {choice}");
    }
    assert_ne!(four.ids[&0], four.ids[&1]);
    world.stop().await;
}

/// Log-probabilities count what may come next: where only one token may, it is certain.
#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_are_those_under_the_constraint() {
    let world = World::start(Wire::InProcess, &["llama"]).await;
    let sampling = v1::Sampling { top_logprobs: Some(20), ..constrained(Regex("[ab]{6}".into()), 0) };
    let answer = world.ask(for_text("llama", completion(vec![text("x")]), sampling)).await.unwrap();
    assert!(!answer.logprobs.is_empty());
    for entry in &answer.logprobs {
        let mass: f32 = entry.top.iter().map(|token| token.logprob.exp()).sum();
        assert!((mass - 1.0).abs() < 1e-4, "{entry:?}");
        assert!(entry.top.iter().all(|token| token.bytes.iter().all(|byte| b"ab".contains(byte))), "{entry:?}");
    }
    world.stop().await;
}

/// A stop string may cut a constrained text short.
#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_work_beside_a_constraint() {
    let world = World::start(Wire::InProcess, &["llama"]).await;
    let sampling = v1::Sampling { stop: vec!["-".into()], ..constrained(Regex("[a-z]{3}-[a-z]{3}".into()), 1) };
    let answer = world.ask(for_text("llama", completion(vec![text("x")]), sampling)).await.unwrap();
    assert_eq!(answer.text().len(), 3, "{:?}", answer.text());
    assert_eq!(answer.reasons[&0], v1::FinishReason::Stop);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gaps_are_filled_in_process() {
    gaps_are_filled(Wire::InProcess).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gaps_are_filled_over_nats() {
    gaps_are_filled(Wire::Nats).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gaps_are_filled_over_direct() {
    gaps_are_filled(Wire::Direct).await;
}

/// The same as the rendered prompt sent as it stands, which the tokenizer's goldens fix.
async fn gaps_are_filled(wire: Wire) {
    let world = World::start(wire, &["janus"]).await;
    let fill = |prefix: &str, suffix: &str| Input::Fim(v1::FillInTheMiddle { prefix: prefix.into(), suffix: suffix.into() });
    for (prefix, suffix) in [("def f(x):\n    ", "\n    return y\n"), ("", "b"), ("a", "")] {
        let filled = world.ask(for_text("janus", fill(prefix, suffix), greedy(12))).await.unwrap();
        let rendered = format!("<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>");
        let continued = world.ask(for_text("janus", completion(vec![text(&rendered)]), greedy(12))).await.unwrap();
        assert_eq!(filled.ids(), continued.ids(), "{prefix:?} {suffix:?}");
        assert_eq!(filled.usage.unwrap().prompt_tokens, continued.usage.unwrap().prompt_tokens);
    }
    // What a program quotes is no token: the prompt is longer than that of the token.
    let quoting = world.ask(for_text("janus", fill("<｜fim▁hole｜>", "x"), greedy(2))).await.unwrap();
    assert!(quoting.usage.unwrap().prompt_tokens > 8, "{quoting:?}");
    // Both at once.
    let sampling = constrained(Regex("return [a-z]".into()), 0);
    let filled = world.ask(for_text("janus", fill("def f(x):\n    ", "\n"), sampling)).await.unwrap();
    assert!(filled.text().starts_with("return ") && filled.text().len() == 8, "{:?}", filled.text());
    world.stop().await;
}
