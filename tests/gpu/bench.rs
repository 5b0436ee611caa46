//! `bench gpu` on the emulated machine: what it counts and what it plans are right, whatever its times say there.

use serde_json::Value;

use crate::support::Place;
use crate::world::{emulated, timed};

const SMALL: &str = "bench gpu --device emulated --model tiny --batch-size 8 --prompt-length 12 --response-length 6 --rank 4 \
                     --steps 2 --sequences 2";

fn lines(place: &Place, words: &str) -> Vec<Value> {
    let ran = place.run(&format!("{SMALL} {words} --json"));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn of<'v>(all: &'v [Value], bench: &'v str) -> impl Iterator<Item = &'v Value> {
    all.iter().filter(move |line| line["bench"] == bench)
}

#[test]
fn planned_memory_is_what_steps_take_and_every_kernel_of_a_step_is_counted() {
    if emulated().is_none() {
        return;
    }
    let _time = timed("bench gpu");
    let place = Place::new();
    let all = lines(&place, "--methods ppo,grpo");
    // Dequantised ahead and kept, a step takes more, and what is planned.
    let kept = lines(&place, "--dequantise kept --no-kernels");
    let (kept, open) = (of(&kept, "gpu/step").next().unwrap(), of(&all, "gpu/step").next().unwrap());
    assert_eq!((&kept["dequantise"], &open["dequantise"]), (&"kept".into(), &"in_turn".into()));
    assert_eq!(kept["planned_bytes"], kept["device_bytes"], "{kept}");
    assert!(kept["device_bytes"].as_u64() > open["device_bytes"].as_u64(), "{kept} {open}");
    assert_eq!(of(&all, "gpu/card").count(), 1);
    let steps: Vec<&Value> = of(&all, "gpu/step").collect();
    assert_eq!(steps.iter().map(|step| step["method"].as_str().unwrap()).collect::<Vec<_>>(), ["ppo", "grpo"]);
    for step in steps {
        // The copies of all adapters, and gradients between micro-batches, are part of it.
        assert_eq!(step["planned_bytes"], step["device_bytes"], "{step}");
        let phases = step["phases"].as_object().unwrap();
        let sum: f64 = ["rollout", "scoring", "update"].iter().map(|phase| phases[*phase].as_f64().unwrap()).sum();
        let (seconds, most) = (step["seconds"].as_f64().unwrap(), step["max"].as_f64().unwrap());
        assert!(sum > 0.0 && seconds > 0.0 && seconds <= most, "{step}");
        assert!(step["first_ratio_var"].as_f64().unwrap() < 1e-4, "rollout and update compute the same: {step}");
    }
    // Both layers streamed: fewer bytes there, and each pass copies them.
    let streamed = lines(&place, "--offload 2 --no-kernels");
    let base = |all: &[Value]| of(all, "gpu/base").next().unwrap().clone();
    let layer = base(&streamed)["pinned_bytes"].as_u64().unwrap() / 2;
    assert!(layer > 0 && base(&all)["pinned_bytes"] == 0);
    let (step, decode) = (of(&streamed, "gpu/step").next().unwrap(), of(&streamed, "gpu/decode").next().unwrap());
    assert_eq!((&step["planned_bytes"], &step["offload"]), (&step["device_bytes"], &2.into()), "{step}");
    // Two buffers hold both layers once they are there.
    assert!(step["streamed_bytes"].as_u64().unwrap() <= 2 * layer && decode["streamed_bytes"] == 0, "{step} {decode}");
    for (method, whole) in ["ppo", "grpo"].into_iter().zip(of(&all, "gpu/kernels")) {
        let kernels: Vec<&Value> = of(&all, "gpu/kernel").filter(|kernel| kernel["method"] == method).collect();
        let sum = |key: &str| kernels.iter().map(|kernel| kernel[key].as_f64().unwrap()).sum::<f64>();
        assert_eq!(sum("calls"), whole["launches"].as_f64().unwrap());
        assert!((sum("ms") / 1e3 - whole["in_kernels"].as_f64().unwrap()).abs() < 1e-9);
        assert!(whole["in_kernels"].as_f64().unwrap() <= whole["seconds"].as_f64().unwrap(), "{whole}");
        let calls = |name: &str| {
            let found = kernels.iter().find(|kernel| kernel["name"] == name);
            found.unwrap_or_else(|| panic!("{method}: no {name}"))["calls"].as_u64().unwrap()
        };
        // Two layers, and the first of six tokens comes from the prompts' pass.
        assert_eq!(calls("attention_append_f16"), 2 * 5);
        let micro_batches = 2;
        let trained = if method == "ppo" { 2 } else { 1 };
        assert_eq!(calls("attention_tiles_dkv_64_f16"), 2 * micro_batches * trained);
        // Every kernel but those over indices alone has operands.
        let idle: Vec<&Value> = kernels.iter().copied().filter(|kernel| kernel["gb_per_s"] == 0.0).collect();
        assert!(idle.is_empty(), "{idle:?}");
    }
}

/// Counting needs neither a card nor a compiler, and tells the bytes that a hand counts.
#[test]
fn a_roofline_counts_the_launches_bytes_and_operations_of_a_step() {
    let place = Place::new();
    let words = "bench gpu --roofline 1000,100 --model tiny --batch-size 8 --prompt-length 12 --response-length 6 --rank 8 --json";
    let ran = place.run(words);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(!ran.stderr.contains("warning"), "random weights set training's warnings off: {}", ran.stderr);
    let all: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kernel = |name: &str| {
        let found = of(&all, "gpu/kernel").find(|kernel| kernel["name"] == name);
        found.unwrap_or_else(|| panic!("no {name} in {all:?}"))
    };
    // Per layer and step, 8 sequences: q of 256 numbers and k and v of 128 are read and written where they lie, k and v are
    // written to the cache, cosines and sines of 32 pairs and indices of 4 bytes are read.
    let append = kernel("attention_append_f16");
    let (calls, numbers) = (2 * 5, 8 * (256 + 2 * 128 + 2 * 128));
    assert_eq!(append["calls"], calls);
    assert_eq!(append["bytes"].as_f64().unwrap() as usize, calls * (2 * numbers + 8 * (2 * 32 * 4 + 4 + 4)));
    // gate and up of a micro-batch of 4 x 18 tokens: 2 m n k of each, added to the branches, which are read.
    let product = kernel("product_f16_f16 72x512x256");
    assert_eq!(
        product["operations"].as_f64().unwrap() / product["calls"].as_f64().unwrap(),
        (2 * 72 * 512 * 256) as f64
    );
    let floor = |kernel: &Value| kernel["floor_ms"].as_f64().unwrap();
    let bytes = 2.0 * (72.0 * 256.0 + 512.0 * 256.0 + 2.0 * 72.0 * 512.0);
    let want = f64::max(bytes / 1e12, (2 * 72 * 512 * 256) as f64 / 1e14) * 1e3;
    assert!((floor(product) / product["calls"].as_f64().unwrap() / want - 1.0).abs() < 1e-9);
    let floors: Vec<f64> = of(&all, "gpu/kernel").map(floor).collect();
    assert!(floors.is_sorted_by(|a, b| a >= b), "the longest first");
    let whole = of(&all, "gpu/kernels").next().unwrap()["floor_seconds"].as_f64().unwrap();
    assert!((floors.iter().sum::<f64>() / 1e3 / whole - 1.0).abs() < 1e-9);
    assert!(of(&all, "gpu/step").chain(of(&all, "gpu/decode")).next().is_none(), "nothing was measured");
    // Without a card there is room for all: what is dequantised beside products, of a step with its numbers kept.
    let beside = |all: &[Value]| of(all, "gpu/kernels").next().unwrap()["floor_beside"].as_f64().unwrap();
    let calls = |all: &[Value]| {
        let found = of(all, "gpu/kernel").filter(|kernel| kernel["name"].as_str().unwrap().starts_with("dequantise_"));
        found.map(|kernel| kernel["calls"].as_u64().unwrap()).sum::<u64>()
    };
    let in_turn = place.run(&format!("{words} --dequantise in_turn"));
    let in_turn: Vec<Value> = in_turn.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(beside(&all) > 0.0 && beside(&all) < whole && beside(&in_turn) == 0.0, "{} {whole}", beside(&all));
    let ahead = place.run(&format!("{words} --dequantise ahead"));
    let ahead: Vec<Value> = ahead.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let all_of = |all: &[Value]| of(all, "gpu/kernels").next().unwrap()["floor_seconds"].as_f64().unwrap();
    assert!((all_of(&ahead) / all_of(&in_turn) - 1.0).abs() < 1e-9, "the same launches in another order");
    // Two layers of actor and critic, each in two micro-batches: gate, up, q, k, v and o are dequantised once less, but for the
    // first layer's q, k and v, which a backward does not read.
    assert_eq!(calls(&in_turn) - calls(&all), 2 * 2 * (2 * 6 - 3));
    // A cache in q8_0 has 34 bytes where f16 has 64: keys and values of 13 to 17 tokens are read, in two layers.
    let ran = place.run(&format!("{words} --kv-cache-type q8_0"));
    let of_q8: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let other = of(&of_q8, "gpu/kernel").find(|kernel| kernel["name"] == "attention_decode_q8_0_f16").unwrap();
    let bytes = |kernel: &Value| kernel["bytes"].as_f64().unwrap() as usize;
    let numbers = 2 * 2 * 8 * 128 * (13..=17).sum::<usize>();
    assert_eq!(bytes(kernel("attention_decode_f16")) - bytes(other), numbers * 30 / 32);
    // The sums of a step alone.
    let ran = place.run(&format!("{words} --no-kernels"));
    let sums: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((all_of(&sums), of(&sums, "gpu/kernel").count()), (all_of(&all), 0), "{}", ran.stdout);
    let table = place.run(&words.replace("--json", "--no-kernels")).stdout;
    assert!(table.contains(" ppo step: ") && !table.contains("floor, ms"), "{table}");
    let refused = place.run("bench gpu --roofline 1000");
    assert!(refused.code == 2 && refused.stderr.contains("such as 2958,683"), "{}", refused.stderr);
}

#[test]
fn what_cannot_be_measured_is_refused_before_anything_is() {
    let place = Place::new();
    for (words, says) in [
        ("--model 70b", "70b is no shape; take one of 135m (SmolLM2)"),
        ("--methods grpo --batch-size 12", "give --batch-size a multiple of 8"),
        ("--steps 0", "--steps 0: give 1 or more"),
        ("--device cpu", "bench gpu measures a card; name one with --device cuda"),
        ("--offload 3", "--offload 3 is more than the 2 layers of tiny; give 2 to keep none on the card, or fewer"),
        ("--prompt-length 65536", "tiny has a context of 65536 tokens, and prompt and response have 65542"),
    ] {
        // The last word of an option counts.
        let given: Vec<&str> = words.split_whitespace().collect();
        let kept: Vec<&str> = SMALL.split_whitespace().collect();
        let mut line: Vec<&str> = kept[..2].to_vec();
        for pair in kept[2..].chunks(2).filter(|pair| !given.contains(&pair[0])) {
            line.extend(pair);
        }
        line.extend(given);
        let ran = place.run(&line.join(" "));
        assert_eq!(ran.code, 2, "{words}: {}", ran.stderr);
        assert!(ran.stderr.contains(says), "{words}: {}", ran.stderr);
    }
}
