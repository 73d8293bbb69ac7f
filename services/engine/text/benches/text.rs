//! How fast text becomes ids and ids become text. `cargo bench -p text`

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use domain::{Input, Message, OutputKind, Part, Role};
use text::TextCodec;

fn main() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures/tokenizers/janus"));
    let codec = TextCodec::load_dir(folder).expect("the fixture loads");
    detokenize(&codec);
    prepare(&codec);
    encode(&codec);
}

/// Best of several runs, in seconds.
fn best(mut run: impl FnMut()) -> f64 {
    (0..7).map(|_| seconds(&mut run)).fold(f64::INFINITY, f64::min)
}

fn seconds(run: &mut impl FnMut()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

fn detokenize(codec: &TextCodec) {
    const TOKENS: usize = 200_000;
    let words = codec.encode("The quick river, 你好 🦙: compiles a small theorem.\n", false);
    let ids: Vec<u32> = words.iter().copied().cycle().take(TOKENS).collect();
    let sixteen: Vec<String> = (0..16).map(|n| format!("\n\nThe end {n}")).collect();
    for (name, stop) in [("no stop strings", vec![]), ("one stop string", vec!["User:".to_owned()]), ("16 stop strings", sixteen)] {
        let took = best(|| {
            let mut stream = codec.detokenizer(stop.clone());
            for id in &ids {
                black_box(stream.push(&[*id]));
            }
            black_box(stream.finish());
        });
        println!("detokenize, one id per push, {name}: {:.0} ns per id", took * 1e9 / TOKENS as f64);
    }
}

fn prepare(codec: &TextCodec) {
    let message = |role, text: &str| Message { role, parts: vec![Part::Text(text.to_owned())] };
    let chat = Input::Chat(vec![
        message(Role::System, "Be brief."),
        message(Role::User, "What is a theorem?"),
        message(Role::Assistant, "A sentence with a proof."),
        message(Role::User, "Say <|User|> and compare."),
    ]);
    const TIMES: usize = 1000;
    let took = best(|| (0..TIMES).for_each(|_| drop(black_box(codec.prepare(&chat, OutputKind::Text)))));
    println!("prepare, four short messages: {:.1} us", took * 1e6 / TIMES as f64);
}

fn encode(codec: &TextCodec) {
    const BYTES: usize = 4 << 20;
    let texts = [
        ("prose", "The quick river compiles a small theorem, 你好. "),
        ("one word", "a"),
        ("spaces before a digit", " "),
        ("digits", "7"),
        ("newlines", "\n"),
        ("code", "    return y * 2  # twice\n"),
        ("smileys", "😀"),
        ("open brackets", "<"),
    ];
    for (name, piece) in texts {
        let text = piece.repeat(BYTES / piece.len()) + "7";
        forget_peak();
        let before = peak();
        let took = seconds(&mut || drop(black_box(codec.encode(&text, false))));
        let chat = Input::Chat(vec![Message { role: Role::User, parts: vec![Part::Text(text)] }]);
        let prepared = seconds(&mut || drop(black_box(codec.prepare(&chat, OutputKind::Text))));
        let grown = peak().saturating_sub(before);
        println!("4 MiB of {name}: encode {:.1} MB/s, prepare {prepared:.2} s, peak memory +{grown} MiB", BYTES as f64 / took / 1e6);
    }
}

/// Lets the peak start anew at what is in use now (Linux; nothing elsewhere).
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The most memory this process had since then, in MiB (Linux; 0 elsewhere).
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}
