//! Every subcommand, as a user or a script calls it.

use serde_json::Value;
use testkit::fixture;

use crate::child::{Server, janua, janua_reading};

const QUESTION: &str = "What is in the image?";

#[tokio::test(flavor = "multi_thread")]
async fn a_server_answers_chat_and_image() {
    let (server, address) = Server::all(&fixture("janus")).await;
    let picture = fixture("janus").join("image0.png").display().to_string();

    let models = janua(&["models", "--server", &address, "--json"]).await.ok().json();
    assert_eq!(models[0]["models"][0]["name"], "janus");

    // JSON: one event per line, in order.
    let chat = ["chat", "--server", &address, "--temperature", "0", "--max-tokens", "8", "--ignore-eos"];
    let run = janua(&[&chat[..], &["--json", "--image", &picture, QUESTION]].concat()).await.ok();
    let events = run.json();
    let names: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!((names[0], names[names.len() - 2], names[names.len() - 1]), ("started", "finished", "completed"));
    let tokens = events.iter().filter_map(|event| event["token_ids"].as_array()).map(Vec::len).sum::<usize>();
    assert_eq!(tokens, 8);
    let told: String = events.iter().filter_map(|event| event["text"].as_str()).collect();

    // The same question in words, from the argument and from the standard input.
    let words = janua(&[&chat[..], &["--image", &picture, QUESTION]].concat()).await.ok().stdout;
    assert_eq!(words, format!("{told}\n"));
    let piped = janua_reading(&[&chat[..], &["--image", &picture]].concat(), &format!("{QUESTION}\n")).await.ok().stdout;
    assert_eq!(piped, words);

    // A drawing is saved where it was asked for.
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("lantern.png");
    let image = ["image", "--server", &address, "--seed", "3", "--out", out.to_str().unwrap()];
    let told = janua(&[&image[..], &["a red lantern"]].concat()).await.ok().stdout;
    assert!(told.contains("lantern.png") && told.contains("seed 3"), "{told}");
    assert!(!told.contains('\x1b'), "no colour where no terminal is");
    let first = std::fs::read(&out).unwrap();
    let picture = pixels::decode(&first, &pixels::Limits::default()).unwrap();
    assert_eq!((picture.width, picture.height), (12, 12));
    let events = janua(&[&image[..], &["--json", "a red lantern"]].concat()).await.ok().json();
    let saved = events.iter().find(|event| event["event"] == "image").unwrap();
    assert_eq!(saved["file"], Value::from(out.to_str().unwrap()));
    assert_eq!(std::fs::read(&out).unwrap(), first, "the same seed draws the same picture");

    // What is wrong is said in one line, with a code of its own.
    let refused = janua(&["chat", "--server", &address, "--temperature", "-1", "hello"]).await;
    assert!(refused.failure(65).contains("sampling.temperature"));
    let refused = janua(&["chat", "--server", &address, "--model", "nobody", "hello"]).await;
    assert!(refused.failure(65).contains("nobody"));

    server.signal("TERM");
    assert_eq!(server.wait().await.code(), Some(0), "SIGTERM drains and ends well");
    let gone = janua(&["chat", "--server", &address, "hello"]).await;
    assert!(gone.failure(69).contains("janua serve"), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_a_server_well() {
    let (server, _) = Server::all(&fixture("llama")).await;
    server.signal("INT");
    assert_eq!(server.wait().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_answers_without_a_server() {
    let llama = fixture("llama").display().to_string();
    let chat = ["chat", "--model-dir", &llama, "--temperature", "0", "--max-tokens", "13", "--ignore-eos", "--raw", "--json"];
    let run = janua(&[&chat[..], &["The quick river compiles a small theorem."]].concat()).await.ok();
    let ids: Vec<Value> = run.json().iter().filter_map(|event| event["token_ids"].as_array().cloned()).flatten().collect();
    let golden: Value = serde_json::from_slice(&std::fs::read(fixture("llama").join("golden.json")).unwrap()).unwrap();
    assert_eq!(Value::from(ids), golden["prompts"][0]["generated_ids"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_take_the_form_that_is_asked_for() {
    let (server, address) = Server::all(&fixture("janus")).await;
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let file = folder.path().join(name);
        std::fs::write(&file, text).unwrap();
        file.display().to_string()
    };
    let schema = r#"{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}"#;
    let (schema_file, grammar) = (write("schema.json", schema), write("rule.lark", "start: \"ja\" | \"nein\""));
    let chat = ["chat", "--server", &address, "--temperature", "0", "Well?"];
    for flags in [["--json-schema", schema], ["--json-schema", &schema_file]] {
        let said = janua(&[&chat[..], &flags].concat()).await.ok().stdout;
        let value: Value = serde_json::from_str(&said).unwrap();
        assert!(value.as_array().is_some_and(|list| list.len() == 2 && list.iter().all(Value::is_boolean)), "{said}");
    }
    let said = janua(&[&chat[..], &["--regex", "[a-c]{4}"]].concat()).await.ok().stdout;
    assert!(said.trim_end().len() == 4 && said.trim_end().bytes().all(|byte| b"abc".contains(&byte)), "{said}");
    let said = janua(&[&chat[..], &["--grammar", &grammar]].concat()).await.ok().stdout;
    assert!(["ja\n", "nein\n"].contains(&said.as_str()), "{said}");
    // One constraint at a time, and one line that says what is wrong with it.
    assert_eq!(janua(&[&chat[..], &["--regex", "a", "--grammar", &grammar]].concat()).await.code, Some(64));
    let refused = janua(&[&chat[..], &["--regex", "("]].concat()).await;
    assert!(refused.failure(65).contains("sampling.constraint.regex"), "{refused:?}");
    let missing = janua(&[&chat[..], &["--json-schema", "/no/such/schema.json"]].concat()).await;
    assert!(missing.failure(66).contains("--json-schema: cannot read /no/such/schema.json"), "{missing:?}");

    // A gap, in a file, in what is piped in, and between two files.
    let draft = "def f(x):\n    <CURSOR>\n    return y\n";
    let file = write("draft.py", draft);
    let (head, tail) = draft.split_once("<CURSOR>").unwrap();
    let (prefix, suffix) = (write("head.py", head), write("tail.py", tail));
    let fill = ["fill", "--server", &address, "--temperature", "0", "--max-tokens", "8", "--ignore-eos"];
    let filled = janua(&[&fill[..], &[&file]].concat()).await.ok().stdout;
    assert!(filled.len() > 1);
    assert_eq!(janua_reading(&fill, draft).await.ok().stdout, filled);
    assert_eq!(janua(&[&fill[..], &["--prefix", &prefix, "--suffix", &suffix]].concat()).await.ok().stdout, filled);
    let whole = janua(&[&fill[..], &["--whole", &file]].concat()).await.ok().stdout;
    assert_eq!(whole, format!("{head}{}{tail}", filled.strip_suffix('\n').unwrap()));
    let events = janua(&[&fill[..], &["--json", &file]].concat()).await.ok().json();
    assert_eq!(events.last().unwrap()["event"], "completed");

    // A picture that was drawn is drawn upon.
    let picture = fixture("janus").join("image0.png").display().to_string();
    let image = ["image", "--server", &address, "--seed", "3", "--json", "at night"];
    let codes = async |more: &[&str]| {
        let out = write("out.png", "");
        let events = janua(&[&image[..], &["--out", &out], more].concat()).await.ok().json();
        events.iter().find(|event| event["event"] == "image").unwrap()["codes"].clone()
    };
    assert_ne!(codes(&["--image", &picture]).await, codes(&[]).await);
    server.signal("TERM");
    assert_eq!(server.wait().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_shows_every_kind_of_request() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("deep/demo.png").display().to_string();
    let run = janua(&["demo", "--model", fixture("janus").to_str().unwrap(), "--once", "--out", &out]).await.ok();
    for told in ["text in, text out", "picture in, text out", "image0.png", "text in, picture out", &out] {
        assert!(run.stdout.contains(told), "{told}: {}", run.stdout);
    }
    assert!(std::fs::metadata(&out).unwrap().len() > 0);
    // A model that only writes is shown writing.
    let run = janua(&["demo", "--model", fixture("llama").to_str().unwrap(), "--once"]).await.ok();
    assert!(run.stdout.contains("text in, text out") && !run.stdout.contains("picture"), "{}", run.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_finds_nothing_on_a_good_machine_and_names_what_is_wrong_on_a_bad_one() {
    let janus = fixture("janus").display().to_string();
    let good = ["doctor", "--model", &janus, "--set", "router.listen=127.0.0.1:0"];
    let report = janua(&[&good[..], &["--json"]].concat()).await.ok().json().remove(0);
    assert_eq!(report["ok"], true);
    let subjects: Vec<_> = report["findings"].as_array().unwrap().iter().map(|f| f["subject"].as_str().unwrap()).collect();
    for subject in ["processor", "onnx runtime", "memory", "model janus", "nats-server", "redis", "router.listen"] {
        assert!(subjects.contains(&subject), "{subject} in {subjects:?}");
    }
    // Ports that nobody listens on, and one that is taken.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("router.listen={}", taken.local_addr().unwrap());
    let bad = ["doctor", "--set", "mesh.nats_url=nats://127.0.0.1:1", "--set", "cache.redis_url=redis://127.0.0.1:1", "--set", &listen];
    let run = janua(&bad).await;
    assert!(run.failure(1).contains("3 problems"), "{run:?}");
    assert_eq!(run.stdout.matches("-> ").count(), 3, "each has its remedy: {}", run.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_flags_and_settings_are_named() {
    let llama = fixture("llama").display().to_string();
    let unmarked = fixture("llama").join("config.json").display().to_string();
    for (args, named) in [
        (vec!["serve", "--model", &llama, "--set", "router.listn=1", "--json"], "router.listn"),
        (vec!["serve", "--model", &llama, "--set", "router.listen=nowhere", "--json"], "router.listen"),
        (vec!["serve", "--model", &llama, "--config", "/no/such/file.toml", "--json"], "/no/such/file.toml"),
        (vec!["serve", "--json"], "--model"),
        (vec!["chat", "--timeout", "-3", "hello"], "--timeout"),
        (vec!["fill", &unmarked], "has no <CURSOR>"),
    ] {
        let run = janua(&args).await;
        let line = run.failure(64);
        assert!(line.contains(named), "{named} is not named in: {line}");
    }
    // clap's own messages have several lines, and the same code.
    assert_eq!(janua(&["serve", "--modle", "x"]).await.code, Some(64));
    for subcommand in ["serve", "chat", "fill", "image", "models", "verify", "doctor", "demo", "completions"] {
        let help = janua(&[subcommand, "--help"]).await.ok().stdout;
        assert!(help.contains("Example"), "the help of {subcommand} has examples: {help}");
    }
    assert!(janua(&["completions", "bash"]).await.ok().stdout.contains("janua"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_measured() {
    let run = janua(&["bench", "checkpoint", "--json", fixture("janus").to_str().unwrap()]).await.ok().json();
    let number = |key: &str| run[0][key].as_f64().unwrap_or_else(|| panic!("{key} in {run:?}"));
    for key in ["weights", "load", "peak", "kv", "memory_ratio", "first_token", "prefill_rate", "decode_rate", "draw"] {
        assert!(number(key) > 0.0, "{key}");
    }
    assert!(number("prompt_tokens") >= 500.0 && number("draw_steps") == 36.0 && number("peak") >= number("loaded"));
    let text = janua(&["bench", "checkpoint", fixture("llama").to_str().unwrap()]).await.ok().stdout;
    assert!(text.contains("llama") && text.contains("decode"), "{text}");
    let refused = janua(&["bench", "checkpoint", "nowhere"]).await;
    assert!(refused.failure(66).contains("nowhere"));
}

#[tokio::test(flavor = "multi_thread")]
async fn graphs_are_written_beside_their_weights() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("janus").join(file), folder.path().join(file)).unwrap();
    }
    let graphs = janua(&["bench", "graphs", folder.path().to_str().unwrap()]).await.ok().json();
    let names: Vec<_> = graphs.iter().map(|graph| graph["graph"].as_str().unwrap()).collect();
    assert_eq!(names, ["vision", "vq"]);
    for graph in &graphs {
        assert!(std::fs::metadata(graph["file"].as_str().unwrap()).unwrap().len() > 0);
        assert_eq!(graph["settings"]["session.intra_op.allow_spinning"], "0");
    }
}
