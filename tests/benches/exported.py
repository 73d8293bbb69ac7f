"""The vision tower and the image decoders beside the same networks exported from PyTorch, on the same ONNX Runtime.

Both graphs take their weights from one random checkpoint of real size (`janua bench families --keep` makes it) and run in this process,
turn by turn, with the same number of threads: ours with the settings that the services give it, the exported one with the runtime's own.
Prints seconds per picture (the best of the rounds), their ratio and that of the processor time, which other programs disturb less, and how
far apart the outputs are. Exits with 1 when they differ.

Usage: exported.py --janua target/release/janua --dir target/bench [--threads 2] [--rounds 5] [--json] [--profile FOLDER]
"""

import argparse
import json
import logging
import pathlib
import subprocess
import sys
import time

import numpy
import onnxruntime
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

# Largest difference that two orders of summation may make, as a part of the largest output.
TOLERANCE = 1e-3
# Wanted: at most this ratio of our time to that of the exported graph.
GOAL = 1.0


class Siglip(nn.Module):
    """Pixels to embeddings: tower and aligner of the transformers port of Janus."""

    def __init__(self, config):
        super().__init__()
        vision = config["vision_config"]
        width, inner = vision["hidden_size"], int(vision["hidden_size"] * vision["mlp_ratio"])
        patch = vision["patch_size"]
        tokens = (vision["image_size"] // patch) ** 2
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.zeros(tokens, width))
        heads, layers = vision["num_attention_heads"], vision["num_hidden_layers"]
        self.blocks = nn.ModuleList(SiglipBlock(width, inner, heads, vision["layer_norm_eps"]) for _ in range(layers))
        self.norm = nn.LayerNorm(width, vision["layer_norm_eps"])
        out = vision["projection_dim"]
        self.aligner = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, pixels):
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.aligner(self.norm(x))

    def load(self, weights):
        root = "model.vision_model."
        names = {"patches": root + "embeddings.patch_embedding", "norm": root + "post_layernorm"}
        names |= {"aligner.0": "model.aligner.fc1", "aligner.2": "model.aligner.hidden_layers.0"}
        for i in range(len(self.blocks)):
            layer = f"{root}encoder.layers.{i}."
            parts = {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
            parts |= {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.projection_layer"}
            names |= {f"blocks.{i}.{ours}": layer + theirs for ours, theirs in parts.items()}
        state = renamed(names, weights)
        state["positions"] = weights[root + "embeddings.position_embedding.weight"]
        self.load_state_dict(state)
        return self


class SiglipBlock(nn.Module):
    def __init__(self, width, inner, heads, epsilon):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(h)
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Residual(nn.Module):
    """GroupNorm, SiLU and a convolution, twice, beside a shortcut: the block of both image decoders."""

    def __init__(self, inside, outside, groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inside, 1e-6), nn.GroupNorm(groups, outside, 1e-6)
        self.conv1, self.conv2 = nn.Conv2d(inside, outside, 3, 1, 1), nn.Conv2d(outside, outside, 3, 1, 1)
        self.short = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        return self.short(x) + self.conv2(functional.silu(self.norm2(h)))


class MapAttention(nn.Module):
    """Every position of a map looks at every other, one head, projections by `layer`."""

    def __init__(self, channels, groups, layer):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.q, self.k, self.v, self.out = (layer(channels) for _ in range(4))
        self.linear = isinstance(self.q, nn.Linear)

    def forward(self, x):
        height, h = x.shape[2], self.norm(x)
        if self.linear:
            h = h.flatten(2).transpose(1, 2)
            q, k, v = self.q(h), self.k(h), self.v(h)
        else:
            q, k, v = (part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        h = functional.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        if self.linear:
            return x + self.out(h).transpose(1, 2).unflatten(2, (height, -1))
        return x + self.out(h.transpose(1, 2).unflatten(2, (height, -1)))


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x):
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Decoder(nn.Module):
    """Latents to pixels: what the decoders of VQ-16 and of SDXL-VAE have in common."""

    def __init__(self, latent, channels, blocks, groups, layer, attention_on_top):
        super().__init__()
        last = channels[0]
        self.conv_in = nn.Conv2d(latent, last, 3, 1, 1)
        self.middle = nn.Sequential(Residual(last, last, groups), MapAttention(last, groups, layer), Residual(last, last, groups))
        levels = []
        for number, width in enumerate(channels):
            parts = []
            for _ in range(blocks):
                parts.append(Residual(last, width, groups))
                last = width
                if number == 0 and attention_on_top:
                    parts.append(MapAttention(width, groups, layer))
            if number + 1 < len(channels):
                parts.append(Up(width))
            levels.append(nn.Sequential(*parts))
        self.levels = nn.Sequential(*levels)
        self.norm = nn.GroupNorm(groups, last, 1e-6)
        self.conv_out = nn.Conv2d(last, 3, 3, 1, 1)

    def forward(self, x):
        return self.conv_out(functional.silu(self.norm(self.levels(self.middle(self.conv_in(x))))))


class Vq(nn.Module):
    """Codes to pixels, as in the transformers port of Janus."""

    def __init__(self, config):
        super().__init__()
        vq = config["vq_config"]
        self.side, self.blocks = vq["num_patches"], vq["num_res_blocks"] + 1
        channels = [vq["base_channels"] * m for m in reversed(vq["channel_multiplier"])]
        self.codes = nn.Embedding(vq["num_embeddings"], vq["embed_dim"])
        self.post = nn.Conv2d(vq["embed_dim"], vq["latent_channels"], 1)
        self.decoder = Decoder(vq["latent_channels"], channels, self.blocks, 32, lambda c: nn.Conv2d(c, c, 1), True)

    def forward(self, codes):
        rows = functional.normalize(self.codes(codes), dim=-1)
        return self.decoder(self.post(rows.transpose(1, 2).unflatten(2, (self.side, self.side))))

    def load(self, weights):
        root = "model.vqmodel."
        names = {"codes": root + "quantize.embedding", "post": root + "post_quant_conv"}
        names |= decoder_names(root, ["mid.block_1", "mid.attn_1", "mid.block_2"], "norm_out")
        for number, level in enumerate(self.decoder.levels):
            residual = attention = 0
            for index, part in enumerate(level):
                ours = f"decoder.levels.{number}.{index}"
                if isinstance(part, Residual):
                    names |= residual_names(ours, f"{root}decoder.up.{number}.block.{residual}", part, "nin_shortcut")
                    residual += 1
                elif isinstance(part, MapAttention):
                    names |= attention_names(ours, f"{root}decoder.up.{number}.attn.{attention}", "norm", ["q", "k", "v", "proj_out"])
                    attention += 1
                else:
                    names[f"{ours}.conv"] = f"{root}decoder.up.{number}.upsample.conv"
        self.load_state_dict(renamed(names, weights))
        return self


class Vae(nn.Module):
    """Latents to pixels, as in SDXL-VAE."""

    def __init__(self, config):
        super().__init__()
        latent, channels = config["latent_channels"], list(reversed(config["block_out_channels"]))
        groups, blocks = config["norm_num_groups"], config["layers_per_block"] + 1
        self.post = nn.Conv2d(latent, latent, 1)
        self.decoder = Decoder(latent, channels, blocks, groups, lambda c: nn.Linear(c, c), False)

    def forward(self, latents):
        return self.decoder(self.post(latents))

    def load(self, weights):
        names = {"post": "post_quant_conv"}
        middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
        names |= decoder_names("", middle, "conv_norm_out", "group_norm", ["to_q", "to_k", "to_v", "to_out.0"])
        for number, level in enumerate(self.decoder.levels):
            for index, part in enumerate(level):
                ours, up = f"decoder.levels.{number}.{index}", f"decoder.up_blocks.{number}"
                if isinstance(part, Residual):
                    names |= residual_names(ours, f"{up}.resnets.{index}", part, "conv_shortcut")
                else:
                    names[f"{ours}.conv"] = f"{up}.upsamplers.0.conv"
        self.load_state_dict(renamed(names, weights))
        return self


def decoder_names(root, middle, norm, attention_norm="norm", attention=("q", "k", "v", "proj_out")):
    names = {f"decoder.{part}": f"{root}decoder.{part}" for part in ["conv_in", "conv_out"]}
    names["decoder.norm"] = f"{root}decoder.{norm}"
    for index in (0, 2):
        names |= residual_names(f"decoder.middle.{index}", f"{root}decoder.{middle[index]}")
    return names | attention_names("decoder.middle.1", f"{root}decoder.{middle[1]}", attention_norm, attention)


def residual_names(ours, theirs, part=None, shortcut=None):
    names = {f"{ours}.{name}": f"{theirs}.{name}" for name in ["norm1", "conv1", "norm2", "conv2"]}
    if part is not None and isinstance(part.short, nn.Conv2d):
        names[f"{ours}.short"] = f"{theirs}.{shortcut}"
    return names


def attention_names(ours, theirs, norm, parts):
    names = dict(zip([f"{ours}.{part}" for part in ["q", "k", "v", "out"]], [f"{theirs}.{part}" for part in parts]))
    return names | {f"{ours}.norm": f"{theirs}.{norm}"}


def renamed(names, weights):
    """State for a module: weight and bias of each of `names` under the module's own names, as f32."""
    state = {}
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in weights:
                state[f"{ours}.{part}"] = weights[f"{theirs}.{part}"]
    return state


def read(folder, prefixes):
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as opened:
            weights |= {name: opened.get_tensor(name).float() for name in opened.keys() if name.startswith(prefixes)}
    return weights


def networks(folder):
    """What there is to compare: name, checkpoint folder, our graph, module, example input."""
    janus, vae = folder / "janus", folder / "janusflow" / "vae"
    noise = torch.Generator().manual_seed(1)
    if janus.is_dir():
        config = json.loads((janus / "config.json").read_text())
        side, codes = config["vision_config"]["image_size"], config["vq_config"]
        vision = Siglip(config).load(read(janus, ("model.vision_model.", "model.aligner.")))
        yield "SigLIP-L/16-384 + aligner", janus, "vision", vision, torch.rand(1, 3, side, side, generator=noise) * 2 - 1
        ids = torch.randint(codes["num_embeddings"], (1, codes["num_patches"] ** 2), generator=noise)
        yield "VQ-16 decoder", janus, "vq", Vq(config).load(read(janus, ("model.vqmodel.",))), ids
    if vae.is_dir():
        config = json.loads((vae / "config.json").read_text())
        module = Vae(config).load(read(vae, ("decoder.", "post_quant_conv.")))
        yield "SDXL-VAE decoder", vae.parent, "vae", module, torch.randn(1, config["latent_channels"], 48, 48, generator=noise)


def export(module, example, file):
    module.eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells what it does without torchvision
    with torch.inference_mode():
        torch.onnx.export(module, (example,), file, input_names=["input"], output_names=["output"], external_data=True, verbose=False)


def session(file, threads, settings, profile):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = not settings  # our sessions do without
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def timed(run):
    start, spent = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - start, time.process_time() - spent, result


def compare(name, ours, exported, values, rounds, run_settings):
    """Both sessions turn by turn; the first round warms them up."""
    runs = {"ours": onnxruntime.RunOptions(), "exported": onnxruntime.RunOptions()}
    for key, value in run_settings.items():
        runs["ours"].add_run_config_entry(key, value)
    best = {"ours": (float("inf"), float("inf")), "exported": (float("inf"), float("inf"))}
    outputs = {}
    for turn in range(rounds + 1):
        pair = [("ours", ours), ("exported", exported)]
        for key, one in pair if turn % 2 == 0 else reversed(pair):
            time.sleep(0.05)  # threads of the other session may still be spinning
            wall, cpu, result = timed(lambda key=key, one=one: one.run(None, {one.get_inputs()[0].name: values}, runs[key])[0])
            outputs[key] = result
            if turn > 0:
                best[key] = (min(best[key][0], wall), min(best[key][1], cpu))
    difference = numpy.abs(outputs["ours"].reshape(-1) - outputs["exported"].reshape(-1)).max()
    row = {"network": name, "ours_s": best["ours"][0], "exported_s": best["exported"][0], "rounds": rounds}
    row |= {"ours_cpu_s": best["ours"][1], "exported_cpu_s": best["exported"][1]}
    row |= {"ratio": best["ours"][0] / best["exported"][0], "cpu_ratio": best["ours"][1] / best["exported"][1]}
    return row | {"difference": float(difference), "largest": float(numpy.abs(outputs["exported"]).max())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--janua", type=pathlib.Path, default="target/release/janua", help="the program that writes our graphs")
    parser.add_argument("--dir", type=pathlib.Path, default="target/bench", help="where `janua bench families --keep` has written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["vision", "vq", "vae"], help="one network alone")
    parser.add_argument("--profile", type=pathlib.Path, help="a folder for the runtime's profiles")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    if not flags.json:
        print(f"ONNX Runtime {onnxruntime.__version__}, PyTorch {torch.__version__}, {flags.threads} threads, best of {flags.rounds}")
        print(f"{'network':<28} {'ours s':>8} {'exported s':>11} {'ratio':>7} {'CPU ratio':>10} {'difference':>11}")
    wrong = 0
    for name, folder, key, module, example in networks(flags.dir):
        if flags.only not in (None, key):
            continue
        said = subprocess.run([flags.janua, "bench", "graphs", folder], check=True, capture_output=True, text=True).stdout
        graph = next((g for g in map(json.loads, said.splitlines()) if g["graph"] == key), None)
        if graph is None:
            print(f"{name:<28} not served", file=sys.stderr)
            continue
        file = flags.dir / "exported" / key / "model.onnx"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            export(module, example, file)
        del module
        profile = {which: flags.profile and flags.profile / f"{key}-{which}" for which in ("ours", "exported")}
        ours = session(graph["file"], flags.threads, graph["settings"], profile["ours"])
        theirs = session(file, flags.threads, {}, profile["exported"])
        row = compare(name, ours, theirs, example.numpy(), flags.rounds, graph["run_settings"])
        row |= {"threads": flags.threads, "goal": GOAL}
        agrees = row["difference"] <= TOLERANCE * row["largest"]
        wrong += not agrees
        note = "" if agrees else f"  OUTPUTS DIFFER (largest {row['largest']:.3g})"
        line = f"{name:<28} {row['ours_s']:>8.3f} {row['exported_s']:>11.3f} {row['ratio']:>7.3f} {row['cpu_ratio']:>10.3f} {row['difference']:>11.2e}{note}"
        print(json.dumps(row) if flags.json else line, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
