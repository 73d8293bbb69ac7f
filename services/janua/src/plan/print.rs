//! A plan for people and as JSON. Units are decimal (1 MB = 10^6 bytes), as those of networks are.

use mesh::MAX_MESSAGE_BYTES;
use serde_json::{Value, json};

use super::shape::{Rest, Shape};
use super::{Plan, Sheet};
use crate::Failure;
use crate::terminal::{self, BAD, BOLD, DIM, GOOD, paint};

/// Prints it in sections of a few lines each.
pub fn table(shape: &Shape, sheet: &Sheet, others: &[Sheet], flags: &Plan) -> Result<(), Failure> {
    let lines = [model(shape), weights(shape, sheet, flags), routing(sheet, flags), wire(shape, sheet, flags), time(shape, sheet, flags)];
    for line in lines.concat().into_iter().chain(splits(shape, sheet, others, flags)) {
        if !terminal::line(&line)? {
            break;
        }
    }
    Ok(())
}

/// A line with its subject in front; following lines have none.
fn row(subject: &str, text: impl std::fmt::Display) -> String {
    format!("{} {text}", paint(BOLD, format!("{subject:<9}")))
}

fn model(shape: &Shape) -> Vec<String> {
    let (gating, sizes) = (shape.gating(), &shape.sizes);
    let groups = gating.groups.map_or_else(String::new, |groups| format!(" from {} of {} groups", groups.kept, groups.count));
    vec![
        row(
            "model",
            format!("{} · {} layers, {} of them with experts · hidden {}", shape.family, sizes.layers, shape.experts.layers, sizes.hidden),
        ),
        row(
            "experts",
            format!(
                "{} a layer, {} for each token{groups} · inner {} · {} shared",
                gating.experts, gating.top_k, shape.experts.inner, shape.experts.shared
            ),
        ),
        row(
            "",
            format!(
                "one is {} ({}-byte numbers), {} over all layers; all of them {}",
                bytes(shape.expert_bytes() as f64),
                sizes.number_bytes,
                bytes(shape.column_bytes() as f64),
                bytes((shape.column_bytes() * gating.experts as u64) as f64),
            ),
        ),
    ]
}

fn weights(shape: &Shape, sheet: &Sheet, flags: &Plan) -> Vec<String> {
    let (least, most) = sheet.shard_bytes(shape);
    let Rest { attention, dense, shared_experts, gates, embedding, head } = shape.rest();
    let [attention, dense, shared, gates, tables] =
        [attention, dense, shared_experts, gates, embedding + head].map(|size| bytes(size as f64));
    let processes = sheet.shards.len() * flags.replicas;
    let sizes = sheet.shards.iter().map(|shard| shard.experts().count());
    let range = |least: String, most: String| if least == most { most } else { format!("{least} to {most}") };
    let (fewest, all) = (sizes.clone().min().unwrap_or(0), count(sizes.max().unwrap_or(0), "expert"));
    let of_each = if least == most { all } else { format!("{fewest} to {all}") };
    let mut lines = vec![
        row(
            "split",
            format!("{} x {} = {}", count(sheet.shards.len(), "shard"), count(flags.replicas, "replica"), count(processes, "process")),
        ),
        row("", format!("each shard {of_each} of every layer, {} of weights", range(bytes(least as f64), bytes(most as f64)))),
        row(
            "language",
            format!(
                "{} of weights: attention {attention}, shared experts {shared}, dense layers {dense}, gates {gates}, embeddings and head {tables}",
                bytes(shape.rest().total() as f64)
            ),
        ),
    ];
    let Some(memory) = flags.node_memory_gb.map(|gigabytes| gigabytes * 1e9) else { return lines };
    let verdict = |fits: bool| if fits { paint(GOOD, "fits") } else { paint(BAD, "does not fit") };
    let fewest = match shape.fewest_shards(memory) {
        Some(fewest) => format!("the fewest equal shards that do: {fewest}"),
        None => "no split does: one expert of every layer is larger".to_owned(),
    };
    lines.push(row("memory", format!("{} a node: the largest shard {}; {fewest}", bytes(memory), verdict(most as f64 <= memory))));
    let left = memory - shape.rest().total() as f64;
    let kv = if left > 0.0 { format!(" with {} left for its KV cache", bytes(left)) } else { String::new() };
    lines.push(row("", format!("the language node {}{kv}", verdict(left >= 0.0))));
    lines
}

fn routing(sheet: &Sheet, flags: &Plan) -> Vec<String> {
    let (traffic, shards) = (&sheet.traffic, sheet.shards.len());
    vec![
        row(
            "routing",
            format!(
                "uniform, {} a step: in each layer a token goes to {} of {}, {} have work",
                count(flags.batch, "token"),
                number(traffic.shards_per_token),
                count(shards, "shard"),
                number(traffic.batches),
            ),
        ),
        row(
            "",
            format!(
                "a shard gets {} rows a layer; the busiest reads {} of its experts, for {} rows",
                number(traffic.rows / shards as f64),
                number(sheet.bound.busiest.experts),
                number(sheet.bound.busiest.rows),
            ),
        ),
    ]
}

fn wire(shape: &Shape, sheet: &Sheet, flags: &Plan) -> Vec<String> {
    let (traffic, layers) = (&sheet.traffic, shape.experts.layers as f64);
    let line = |what: &str, factor: f64| {
        let [up, down] = [traffic.up * factor, traffic.down * factor].map(bytes);
        format!("{what:<24} {up:>9} out, {down:>9} back")
    };
    let tokens = flags.batch as f64;
    let overhead = format!("; {} of both are ids, counts and frames", bytes(traffic.overhead / tokens));
    let mut lines = vec![
        row("wire", line(&format!("{}, token and layer", flags.activations.name()), 1.0 / tokens) + &paint(DIM, overhead)),
        row("", line("token, all layers", layers / tokens)),
        row("", line(&format!("step of {}", count(flags.batch, "token")), layers)),
    ];
    if traffic.largest_batch > MAX_MESSAGE_BYTES as f64 {
        let limit =
            format!("a batch of {} is refused, messages have at most {}", bytes(traffic.largest_batch), bytes(MAX_MESSAGE_BYTES as f64));
        lines.push(row("", paint(BAD, format!("{limit}: take a smaller --batch or more shards"))));
    }
    lines
}

fn time(shape: &Shape, sheet: &Sheet, flags: &Plan) -> Vec<String> {
    let (bound, layers, machines) = (&sheet.bound, shape.experts.layers, flags.machines());
    let per_row = flags.compute_us_per_row_layer.map_or_else(String::new, |us| format!(", {us} us a row"));
    let nodes = bound.language_nodes(layers, flags.replicas);
    let meanwhile = format!("(meanwhile shared experts {})", seconds(bound.shared));
    vec![
        row(
            "assumed",
            format!("link {} Gbit/s, round trip {} us, memory {} GB/s{per_row}", flags.bandwidth_gbit, flags.rtt_us, flags.memory_gb_per_s),
        ),
        row(
            "time",
            format!(
                "layer of experts {} = round trip {} + wire {} + busiest shard {} {}",
                seconds(bound.layer),
                seconds(machines.round_trip),
                seconds(bound.transfer),
                seconds(bound.shard),
                paint(DIM, meanwhile),
            ),
        ),
        row(
            "",
            format!("step {} = {layers} x {} + the rest of the model {}", seconds(bound.step), seconds(bound.layer), seconds(bound.rest)),
        ),
        row(
            "bound",
            format!(
                "{} of one language node; most of it is {}",
                paint(GOOD, format!("{} tokens/s", number(bound.tokens_per_second))),
                bound.limit(layers, machines.round_trip)
            ),
        ),
        row(
            "",
            format!("{} of each shard can serve {} at this rate", count(flags.replicas, "replica"), count(nodes as usize, "language node")),
        ),
    ]
}

fn splits(shape: &Shape, sheet: &Sheet, others: &[Sheet], flags: &Plan) -> Vec<String> {
    let head = ["shards", "largest", "shards/token", "out/token", "back/token", "tokens/s"];
    let columns = |cells: [String; 6]| {
        let [shards, largest, per_token, out, back, rate] = cells;
        format!("{shards:>9} {largest:>10} {per_token:>13} {out:>10} {back:>10} {rate:>9}")
    };
    let factor = shape.experts.layers as f64 / flags.batch as f64;
    let mut sheets: Vec<_> = others.iter().map(|other| (other, false)).chain([(sheet, true)]).collect();
    sheets.sort_by_key(|(sheet, is_chosen)| (sheet.shards.len(), *is_chosen));
    let line = |(sheet, is_chosen): (&Sheet, bool)| {
        let text = columns([
            sheet.shards.len().to_string(),
            bytes(sheet.shard_bytes(shape).1 as f64),
            number(sheet.traffic.shards_per_token),
            bytes(sheet.traffic.up * factor),
            bytes(sheet.traffic.down * factor),
            number(sheet.bound.tokens_per_second),
        ]);
        if is_chosen { paint(GOOD, format!("{text}  <")) } else { text }
    };
    let head = paint(BOLD, columns(head.map(str::to_owned)));
    [String::new(), head].into_iter().chain(sheets.into_iter().map(line)).collect()
}

/// Prints one object. Sizes in bytes, times in seconds.
pub fn json(shape: &Shape, sheet: &Sheet, others: &[Sheet], flags: &Plan) -> Result<(), Failure> {
    let (gating, rest, memory) = (shape.gating(), shape.rest(), flags.node_memory_gb.map(|gigabytes| gigabytes * 1e9));
    let fits = memory.map(|memory| {
        let shard = sheet.shard_bytes(shape).1 as f64 <= memory;
        json!({"shard": shard, "language": rest.total() as f64 <= memory, "fewest_shards": shape.fewest_shards(memory)})
    });
    let value = json!({
        "model": {
            "family": shape.family,
            "layers": shape.sizes.layers,
            "expert_layers": shape.experts.layers,
            "experts": gating.experts,
            "top_k": gating.top_k,
            "groups": gating.groups.map(|groups| json!({"count": groups.count, "kept": groups.kept})),
            "shared": shape.experts.shared,
            "hidden": shape.sizes.hidden,
            "inner": shape.experts.inner,
            "number_bytes": shape.sizes.number_bytes,
            "expert_bytes": shape.expert_bytes(),
        },
        "language": {
            "bytes": rest.total(),
            "attention": rest.attention,
            "shared_experts": rest.shared_experts,
            "dense": rest.dense,
            "gates": rest.gates,
            "embedding": rest.embedding,
            "head": rest.head,
        },
        "replicas": flags.replicas,
        "batch": flags.batch,
        "activations": flags.activations.name(),
        "fits": fits,
        "plan": split(shape, sheet, flags),
        "shards": sheet.shards.iter().map(|&shard| json!({"range": shard.to_string(), "bytes": shape.shard_bytes(shard)})).collect::<Vec<_>>(),
        "others": others.iter().map(|other| split(shape, other, flags)).collect::<Vec<_>>(),
    });
    terminal::json(&value).map(drop)
}

fn split(shape: &Shape, sheet: &Sheet, flags: &Plan) -> Value {
    let Sheet { traffic, bound, shards } = sheet;
    let (least, most) = sheet.shard_bytes(shape);
    json!({
        "shards": shards.len(),
        "shard_bytes": {"least": least, "most": most},
        "shards_per_token": traffic.shards_per_token,
        "rows_per_shard": traffic.rows / shards.len() as f64,
        "busiest": {"experts": bound.busiest.experts, "rows": bound.busiest.rows},
        "step_layer_bytes": {"up": traffic.up, "down": traffic.down, "overhead": traffic.overhead},
        "layer_s": {"round_trip": flags.machines().round_trip, "transfer": bound.transfer, "shard": bound.shard, "shared": bound.shared, "all": bound.layer},
        "rest_s": bound.rest,
        "step_s": bound.step,
        "tokens_per_s": bound.tokens_per_second,
        "language_nodes": bound.language_nodes(shape.experts.layers, flags.replicas).floor(),
    })
}

fn count(number: usize, noun: &str) -> String {
    let plural = if noun.ends_with('s') { "es" } else { "s" };
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}{plural}") }
}

/// Three digits that matter.
fn number(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => trimmed(format!("{value:.1}")),
        value => trimmed(format!("{value:.2}")),
    }
}

fn trimmed(text: String) -> String {
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn bytes(bytes: f64) -> String {
    let units = ["B", "KB", "MB", "GB", "TB"];
    let power = (1..units.len()).take_while(|&power| bytes >= 1e3f64.powi(power as i32)).count();
    format!("{} {}", number(bytes / 1e3f64.powi(power as i32)), units[power])
}

fn seconds(seconds: f64) -> String {
    match seconds {
        seconds if seconds >= 1.0 => format!("{} s", number(seconds)),
        seconds if seconds >= 1e-3 => format!("{} ms", number(seconds * 1e3)),
        seconds => format!("{} us", number(seconds * 1e6)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        for (value, expected) in [(0.0375, "0.04"), (1.0, "1"), (2.868, "2.87"), (47.19, "47.2"), (20.0, "20"), (120.4, "120")] {
            assert_eq!(number(value), expected);
        }
        for (value, expected) in
            [(12.0, "12 B"), (999.0, "999 B"), (1e3, "1 KB"), (47_185_920.0, "47.2 MB"), (4.454e11, "445 GB"), (2e15, "2000 TB")]
        {
            assert_eq!(bytes(value), expected);
        }
        for (value, expected) in [(2.0, "2 s"), (0.0123, "12.3 ms"), (1e-4, "100 us")] {
            assert_eq!(seconds(value), expected);
        }
        assert_eq!([count(1, "process"), count(2, "process"), count(3, "shard")], ["1 process", "2 processes", "3 shards"]);
    }
}
