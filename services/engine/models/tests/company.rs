//! A sequence gives the same bits whatever else is in its steps, wherever its blocks lie, and on any number of threads.

#![allow(clippy::unwrap_used)]

mod support;

use backend_native::Isa;
use layers::{BlockId, Head, LanguageModel, NoObserver, RowInput};
use support::{
    Recorder, Sequence, WHOLE, advance, argmax, assert_close, decode, fixture, generate, golden::Golden, load, load_with, prefill, tokens,
};

const FIXTURES: [&str; 7] = ["llama", "llama_gqa", "moe_v1", "v2_lite", "v2_full", "janus", "deepseek_vl"];

fn prompt(fixture_name: &str, prompt: &str) -> Vec<u32> {
    Golden::open(&fixture(fixture_name)).ids(&format!("{prompt}.input_ids"))
}

/// Logits after every one of eight greedy outputs, alone and in one piece.
fn alone(model: &mut dyn LanguageModel, ids: &[u32]) -> (Vec<u32>, Vec<f32>) {
    generate(model, &mut Sequence::tokens(ids), WHOLE, 8)
}

#[test]
fn chunks_and_scattered_blocks_change_nothing() {
    for name in FIXTURES {
        let mut model = load(&fixture(name));
        let ids = prompt(name, "p0");
        let expected = alone(model.as_mut(), &ids);
        for (chunk, stride) in [(7, 1), (1, 1), (WHOLE, 27), (7, 27), (16, 45)] {
            let blocks = (0..64).map(|i| (i * stride + 11) % 64).collect();
            let mut sequence = Sequence::new(tokens(&ids), blocks, Head::Text);
            assert!(generate(model.as_mut(), &mut sequence, chunk, 8) == expected, "{name}, chunks of {chunk}, blocks {stride} apart");
        }
    }
}

#[test]
fn company_changes_nothing() {
    for name in FIXTURES {
        let mut model = load(&fixture(name));
        let ids = prompt(name, "p0");
        let expected = alone(model.as_mut(), &ids);

        // The sequence in question decodes while others prefill in chunks, decode, come and go.
        let table = |first: BlockId| (0..8).map(|i| (first + 5 * i) % 64).collect::<Vec<_>>();
        let mut others: Vec<_> = (0..4u32).map(|i| Sequence::new(tokens(&ids[i as usize..]), table(i), Head::Text)).collect();
        let mut ours = Sequence::new(tokens(&ids), table(4), Head::Text);
        let (mut outputs, mut logits) = (Vec::new(), Vec::new());
        for round in 0.. {
            let mut batch: Vec<(&mut Sequence, usize)> = Vec::new();
            for (i, other) in others.iter_mut().enumerate() {
                if other.done == other.inputs.len() {
                    other.inputs.push(RowInput::Token(ids[(round + i) % ids.len()]));
                }
                if (round + i) % 3 != 0 && other.done + 9 < other.capacity() {
                    batch.push((other, 3 + 2 * i));
                }
            }
            let place = round % (batch.len() + 1);
            batch.insert(place, (&mut ours, 5));
            let output = advance(model.as_mut(), &mut batch, &mut NoObserver).logits.remove(place);
            let Some(row) = output else { continue };
            if !outputs.is_empty() {
                logits.extend_from_slice(&row);
            }
            outputs.push(argmax(&row));
            if outputs.len() == expected.0.len() {
                break;
            }
            ours.inputs.push(RowInput::Token(*outputs.last().unwrap()));
        }
        assert_eq!(outputs, expected.0, "{name}");
        assert!(logits == expected.1, "{name}: logits in company");
    }
}

#[test]
fn a_prefix_of_another_sequence_serves_as_well_as_ones_own() {
    // Prompts of more than one whole block.
    for (name, prompt_name) in [("llama", "p1"), ("moe_v1", "p1"), ("v2_lite", "p1"), ("v2_full", "p0")] {
        let mut model = load(&fixture(name));
        let ids = prompt(name, prompt_name);
        let expected = alone(model.as_mut(), &ids);
        let mut first = Sequence::new(tokens(&ids[..16]), vec![9], Head::Text);
        prefill(model.as_mut(), &mut first, WHOLE, &mut NoObserver);
        let mut second = Sequence::new(tokens(&ids), vec![9, 3, 4, 61], Head::Text);
        second.done = 16;
        assert!(generate(model.as_mut(), &mut second, WHOLE, 8) == expected, "{name}");
    }
}

#[test]
fn being_observed_changes_nothing() {
    for name in FIXTURES {
        let mut model = load(&fixture(name));
        let ids = prompt(name, "p0");
        let unseen = prefill(model.as_mut(), &mut Sequence::tokens(&ids), WHOLE, &mut NoObserver);
        assert!(prefill(model.as_mut(), &mut Sequence::tokens(&ids), WHOLE, &mut Recorder::default()) == unseen, "{name}");
    }
}

#[test]
fn threads_change_nothing_and_instruction_sets_only_roundings() {
    const TOLERANCE: f32 = 1e-4;
    for name in FIXTURES {
        let ids = prompt(name, "p0");
        let run = |isa, threads| alone(load_with(&fixture(name), isa, threads).as_mut(), &ids);
        let expected = run(Isa::detect(), 1);
        for threads in [2, 3] {
            assert!(run(Isa::detect(), threads) == expected, "{name} with {threads} threads");
        }
        let reference = run(Isa::Scalar, 2);
        assert_eq!(reference.0, expected.0, "{name}: ids on the reference kernels");
        assert_close(name, &reference.1, &expected.1, TOLERANCE);
    }
}

#[test]
fn text_and_codes_share_a_step() {
    let mut model = load(&fixture("janus"));
    let (text, drawing) = (prompt("janus", "p0"), Golden::open(&fixture("janus")).ids("t2i0.cond_ids"));
    let table = |first: BlockId| (first..first + 8).collect::<Vec<_>>();
    let reader = || Sequence::new(tokens(&text), table(0), Head::Text);
    let drawer = || Sequence::new(tokens(&drawing), table(8), Head::Image);
    let expected_text = prefill(model.as_mut(), &mut reader(), WHOLE, &mut NoObserver);
    let mut alone = drawer();
    prefill(model.as_mut(), &mut alone, WHOLE, &mut NoObserver);
    let expected_codes = decode(model.as_mut(), &mut alone, RowInput::Code(7));

    let mut together = drawer();
    prefill(model.as_mut(), &mut together, WHOLE, &mut NoObserver);
    together.inputs.push(RowInput::Code(7));
    let output = advance(model.as_mut(), &mut [(&mut together, 1), (&mut reader(), WHOLE)], &mut NoObserver);
    assert!(output.logits == [Some(expected_codes), Some(expected_text)]);
}
