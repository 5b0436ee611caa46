//! Weights that are dequantised while a product runs, and kept from the recomputation to the backward: the bits of weights that are
//! dequantised one by one, each matrix once, in the memory that a plan counts; and the plan that decides it.

use std::fs;

use fourfold::config::{self, Ppo, Stage};
use fourfold::device::{Device, DeviceChoice, Element, select};
use fourfold::model::adapter::{Adapter, TargetModules};
use fourfold::model::base::Base;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::init::dora::with_magnitudes;
use fourfold::model::readers::Sharing;
use fourfold::model::roles::Policy;
use fourfold::ops::linear::gpu::Dequantising;
use fourfold::ops::weight::ComputeDtype;
use fourfold::run::{self, Model, RunOptions};
use serde_json::Value;

use crate::fault_world::{place, run_all};
use crate::parity::{families, golden};
use crate::ppo_world::{model_of, to_bits};
use crate::readers::{long, quantised, ran};
use crate::stages::short_ppo;
use crate::streaming::LAYERS;
use crate::tiny_decoders::open;
use crate::world::{adapter, emulated, machine, named, on, timed};

const ALL: [Dequantising; 3] = [Dequantising::InTurn, Dequantising::Ahead, Dequantising::Kept];

/// The bits of log-probabilities and of all gradients of a pass over whole sequences.
fn bits(base: &Base, actor: &Adapter, batch: &Batch, recompute: Recompute) -> anyhow::Result<Vec<Vec<u32>>> {
    let all: Vec<bool> = batch.positions().iter().map(|&position| position > 0).collect();
    let (targets, policy) = (Targets::masked(batch, &all)?, Policy::new(base, Some(actor)));
    let mut logprobs = vec![];
    let (_, grads) = policy.gradients(batch, &targets, 1.0, recompute, |found| {
        logprobs = found.logprobs.to_vec();
        Ok((found.logprobs.to_vec(), vec![0.5; found.logprobs.len()]))
    })?;
    let grads = named(actor, &grads).into_iter().map(|(_, values)| values);
    Ok([logprobs].into_iter().chain(grads).map(|values| to_bits(&values)).collect())
}

/// The weights of `base` are dequantised in turn, and then in other ways, of which the backward recomputes in so many ways.
fn assert_same(name: &str, base: &Base, actor: &Adapter, batch: &Batch, ways: &[(Dequantising, Recompute)]) {
    let of = |how: Dequantising, recompute: Recompute| {
        base.set_dequantise(how);
        bits(base, actor, batch, recompute).unwrap_or_else(|e| panic!("{name}, {how:?}, {recompute:?}: {e:#}"))
    };
    let want = of(Dequantising::InTurn, Recompute::Block);
    assert!(want.iter().flatten().all(|&bits| f32::from_bits(bits).is_finite()), "{name}");
    for &(how, recompute) in ways {
        assert!(of(how, recompute) == want, "{name}, {how:?}, {recompute:?}");
    }
}

#[test]
fn every_family_computes_the_same_bits_however_its_weights_are_dequantised() {
    let Some((_machine, device)) = machine() else { return };
    let _time = timed("ways to dequantise");
    let check = |name: &str, path: &str, actor: &dyn Fn(&Base) -> Adapter| {
        let opened = open(path);
        let actor = actor(&opened.base);
        let batch = Batch::new(&long(&opened.golden.sequences)).unwrap();
        // Matrices of f32 are dequantised in f16.
        let base = on(opened.base.computing_in(ComputeDtype::F16), &device);
        let before = device.work();
        assert_same(name, &base, &actor, &batch, &[(Dequantising::Kept, Recompute::Block)]);
        assert!((device.work() - before).beside > 0, "{name}");
    };
    let plain = |base: &Base| adapter(base, TargetModules::AllLinear, 2, 5);
    for path in families() {
        check(&path, &path, &plain);
    }
    for folder in golden("lora_targets", "") {
        let name = folder.file_name().unwrap().to_str().unwrap();
        let path = format!("lora_targets/{name}/golden.safetensors");
        check(name, &path, &|base: &Base| Adapter::load(&folder, base.shapes()).unwrap());
    }
    check("DoRA", &families()[0], &|base: &Base| with_magnitudes(&plain(base), base).unwrap());
}

#[test]
fn every_recomputation_computes_the_same_bits_however_weights_are_dequantised() {
    let Some((_machine, device)) = machine() else { return };
    let (base, batch) = quantised(&device, 0);
    let actor = adapter(&base, TargetModules::AllLinear, 2, 3);
    let ways = ALL.iter().flat_map(|&how| Recompute::ALL.map(|recompute| (how, recompute)));
    assert_same("the quickstart's base", &base, &actor, &batch, &ways.collect::<Vec<_>>());
}

#[test]
fn streamed_layers_give_the_bits_of_resident_ones() {
    let Some((_machine, device)) = machine() else { return };
    let (resident, batch) = quantised(&device, 0);
    let actor = adapter(&resident, TargetModules::AllLinear, 2, 3);
    let want = bits(&resident, &actor, &batch, Recompute::Block).unwrap();
    for layers in [1, LAYERS] {
        let (streamed, _) = quantised(&device, layers);
        for how in [Dequantising::Ahead, Dequantising::Kept] {
            streamed.set_dequantise(how);
            for recompute in [Recompute::Block, Recompute::Offload] {
                assert!(
                    bits(&streamed, &actor, &batch, recompute).unwrap() == want,
                    "{layers}, {how:?}, {recompute:?}"
                );
            }
        }
    }
}

#[test]
fn a_wait_that_is_left_out_is_seen() {
    let Some((machine, device)) = machine() else { return };
    let (base, batch) = quantised(&device, 0);
    let actor = adapter(&base, TargetModules::AllLinear, 2, 3);
    base.set_dequantise(Dequantising::Ahead);
    let want = bits(&base, &actor, &batch, Recompute::Block).unwrap();
    machine.forget_arrivals(true);
    let without = bits(&base, &actor, &batch, Recompute::Block).unwrap();
    assert!(without.iter().flatten().any(|&bits| f32::from_bits(bits).is_nan()), "numbers nobody waited for are NaN");
    machine.forget_arrivals(false);
    assert!(bits(&base, &actor, &batch, Recompute::Block).unwrap() == want);
}

#[test]
fn a_device_that_fails_meanwhile_ends_the_pass_and_the_next_pass_is_right() {
    let Some((machine, device)) = machine() else { return };
    let (base, batch) = quantised(&device, 0);
    let actor = adapter(&base, TargetModules::AllLinear, 2, 3);
    base.set_dequantise(Dequantising::Kept);
    // Beyond what a first pass finds.
    bits(&base, &actor, &batch, Recompute::Block).unwrap();
    let before = device.work();
    let want = bits(&base, &actor, &batch, Recompute::Block).unwrap();
    let (work, live) = (device.work() - before, device.usage().live);
    let all = (work.launches + work.products) as u64;
    for after in (0..all).step_by(7) {
        machine.fail_launch_after(Some(after));
        let error = bits(&base, &actor, &batch, Recompute::Block).unwrap_err();
        assert!(format!("{error:#}").contains("as a test asked for"), "{after}: {error:#}");
        machine.fail_launch_after(None);
        assert_eq!(device.usage().live, live, "{after}: all memory came back");
    }
    assert!(bits(&base, &actor, &batch, Recompute::Block).unwrap() == want);
    device.synchronize().unwrap();
}

/// Dequantisations, and those of them beside products, of a forward and its backward.
fn counted(how: Dequantising, recompute: Recompute) -> (usize, usize) {
    let device = Device::dry();
    let (base, batch) = quantised(&device, 0);
    let actor = adapter(&base, TargetModules::AllLinear, 2, 3);
    base.set_dequantise(how);
    let run = || {
        let (h, tape) = base.forward(&batch, &actor, recompute).unwrap();
        base.backward(&batch, &actor, tape, h).unwrap();
    };
    let before = device.work();
    run();
    let beside = (device.work() - before).beside;
    device.begin_profile().unwrap();
    run();
    let kernels = device.end_profile().unwrap();
    // lm_head is not read.
    (kernels.iter().filter(|kernel| kernel.name.starts_with("dequantise_")).map(|k| k.calls).sum(), beside)
}

#[test]
fn each_matrix_is_dequantised_once_for_recomputation_and_backward() {
    // q, k, v, o, gate, up, down. The backward of the lowest layer reads no q, k and v.
    let (matrices, unread) = (7, 3);
    let first_of_each = LAYERS;
    let forward = LAYERS * matrices;
    for (recompute, again) in [(Recompute::Block, 6), (Recompute::Mlp, 2), (Recompute::Off, 0)] {
        let backward = LAYERS * matrices - unread;
        assert_eq!(counted(Dequantising::InTurn, recompute), (forward + LAYERS * again + backward, 0), "{recompute:?}");
        let (all, beside) = counted(Dequantising::Ahead, recompute);
        assert_eq!(all, forward + LAYERS * again + backward, "{recompute:?}");
        // The first one of a forward, and of a backward with its recomputation, has no product before it.
        assert_eq!(beside, all - 2 * first_of_each, "{recompute:?}");
        let (all, beside) = counted(Dequantising::Kept, recompute);
        // A recomputation dequantises q, k and v of the lowest layer, too.
        let once = if recompute == Recompute::Block { LAYERS * matrices } else { backward };
        assert_eq!((all, beside), (forward + once, forward + once - 2 * first_of_each), "{recompute:?}");
    }
}

#[test]
fn a_device_holds_two_matrices_ahead_and_most_of_a_block_kept() {
    let device = Device::dry();
    let (base, batch) = quantised(&device, 0);
    let actor = adapter(&base, TargetModules::AllLinear, 2, 3);
    let peak = |how: Dequantising| {
        base.set_dequantise(how);
        let run = || {
            let (h, tape) = base.forward(&batch, &actor, Recompute::Block).unwrap();
            base.backward(&batch, &actor, tape, h).unwrap();
        };
        run();
        device.reset_peak();
        run();
        device.usage().peak
    };
    let [in_turn, ahead, kept] = ALL.map(peak);
    let shapes = base.shapes();
    let sizes = shapes.linears().iter().map(|map| map.out_features * map.in_features * Element::F16.bytes());
    let sizes: Vec<usize> = sizes.collect();
    let (sum, largest) = (sizes.iter().sum::<usize>(), *sizes.iter().max().unwrap());
    assert!(ahead > in_turn && ahead <= in_turn + largest, "{in_turn} {ahead} {largest}");
    assert!(kept > ahead && kept <= in_turn + sum, "{in_turn} {kept} {sum}");
}

#[test]
fn runs_leave_the_same_bytes_however_weights_are_dequantised() {
    let Some(device) = emulated() else { return };
    let _time = timed("runs of all ways to dequantise");
    let model = model_of(2).computing_in(ComputeDtype::F16);
    let model = Model { base: on(model.base, &device), ..model };
    // Passes of more rows than products straight from the stored bytes take.
    let config = Ppo { total_episodes: 8, batch_size: 4, micro_batch_size: 4, response_length: 20, ..short_ppo() };
    let of = |how: Dequantising, sharing: Sharing| {
        model.base.set_dequantise(how);
        let before = device.work();
        (ran(&model, &config, sharing), (device.work() - before).beside > 0)
    };
    let want = of(Dequantising::InTurn, Sharing::Apart);
    assert!(!want.0.0.is_empty() && !want.1);
    for (how, sharing) in [
        (Dequantising::Ahead, Sharing::Apart),
        (Dequantising::Kept, Sharing::Blocks),
        (Dequantising::Kept, Sharing::Weights),
    ] {
        assert!(of(how, sharing) == (want.0.clone(), true), "{how:?}, {sharing:?}");
    }
}

/// Without a limit, weights are dequantised ahead and kept where that leaves the peak where it is, and with one where it fits.
#[test]
fn a_plan_dequantises_ahead_and_keeps_what_fits() {
    if emulated().is_none() {
        return;
    }
    let place = place();
    run_all(&place, &["sft"]);
    let whole = |more: &str| -> Value {
        let ran = place.run(&format!(
            "plan run.toml --phase sft --set data.path=sft.jsonl --device emulated --json --set sft.checkpoint=block \
             --set sft.per_device_train_batch_size=4 {more}"
        ));
        assert!([0, 2].contains(&ran.code), "{}", ran.stderr);
        serde_json::from_str::<Value>(&ran.stdout).expect(&ran.stderr)
    };
    let of = |more: &str| whole(more)["devices"]["emulated"].clone();
    let plan = |more: &str| of(&format!("--set base.quantize=q8_0 --set base.compute_dtype=f16 {more}"));
    let peak = |plan: &Value| plan["peak"]["bytes"].as_u64().unwrap();
    let open = plan("");
    assert_eq!(open["dequantise"], serde_json::json!({"base": "in_turn"}), "{open}");
    let beside = open["context"].as_u64().unwrap() + open["workspace"].as_u64().unwrap();
    let mut before = 0;
    for name in ["in_turn", "ahead", "kept"] {
        let named = plan(&format!("--set base.dequantise={name}"));
        assert_eq!(named["dequantise"]["base"], name, "{named}");
        let most = peak(&named);
        assert!(most > before, "{name}: {most}, {before}");
        before = most;
        // One part in 32 stays free.
        let found = plan(&format!("--set memory.device_limit={}", most * 32 / 31 + 64 + beside));
        assert_eq!((&found["dequantise"]["base"], peak(&found)), (&name.into(), most), "{found}");
    }
    assert_eq!(peak(&open), peak(&plan("--set base.dequantise=in_turn")));
    // More than there is room for is asked for: the change that fits is to leave it to the plan.
    let tight = whole(&format!(
        "--set base.quantize=q8_0 --set base.compute_dtype=f16 --set base.dequantise=kept --set memory.device_limit={}",
        peak(&open) * 32 / 31 + 64 + beside
    ));
    assert_eq!(tight["smallest_change"]["set"], serde_json::json!({"base.dequantise": "auto"}), "{tight}");
    // Each of two bases on one device by its own key.
    fs::create_dir(place.path("rm")).unwrap();
    for file in fs::read_dir(place.path("base")).unwrap().map(|file| file.unwrap().path()) {
        fs::copy(&file, place.path("rm").join(file.file_name().unwrap())).unwrap();
    }
    let ran = place.run(
        "plan run.toml --phase ppo --set data.path=prompts.jsonl --device emulated --json --set base.quantize=q8_0 \
         --set base.compute_dtype=f16 --set base.dequantise=kept --set reward_base.path=rm --set reward_base.quantize=q8_0 \
         --set reward_base.compute_dtype=f16 --set reward_base.dequantise=ahead --set ppo.checkpoint=block",
    );
    let both: Value = serde_json::from_str(&ran.stdout).expect(&ran.stderr);
    let on = &both["devices"]["emulated"];
    assert_eq!(on["dequantise"], serde_json::json!({"base": "kept", "second_base": "ahead"}), "{on}");
    // The table of arrangements has the weights that lie there: twice as much with a base for each pair of roles.
    let bytes = |i: usize| both["arrangements"][i]["bytes"]["base"].as_u64().unwrap();
    assert_eq!((bytes(2), bytes(3)), (on["base"].as_u64().unwrap(), on["base"].as_u64().unwrap() / 2), "{both}");
    let table = place.run("plan run.toml --phase sft --device emulated").stdout;
    let head = table.lines().find(|line| line.starts_with("roles, at the peak")).expect(&table);
    assert!(head.contains(" base ") && table.contains("weights on a card are in these rows"), "{table}");
    // What is stored as products need it is not dequantised.
    let dense = of("--set base.compute_dtype=bf16 --set memory.device_limit=64GiB");
    assert_eq!(dense["dequantise"]["base"], "in_turn", "{dense}");
}

/// A run goes by what its plan has chosen, and by the key where it is written.
#[test]
fn a_run_dequantises_as_its_plan_does() {
    if emulated().is_none() {
        return;
    }
    let place = place();
    run_all(&place, &["sft"]);
    let device = || select(DeviceChoice::Emulated).unwrap().device.unwrap();
    let mut left: Option<Vec<u8>> = None;
    for (more, ahead) in [("", false), ("memory.device_limit=64GiB", true), ("base.dequantise=ahead", true)] {
        let data = format!("data.path={}", place.path("sft.jsonl").display());
        let base = format!("base.path={}", place.path("base").display());
        let mut sets = vec![data, base];
        let rest = "base.device=emulated base.quantize=q8_0 base.compute_dtype=f16 sft.checkpoint=block";
        sets.extend(rest.split(' ').chain(Some(more).filter(|more| !more.is_empty())).map(String::from));
        let config = config::load(&place.path("run.toml"), &sets).unwrap();
        let (out, before) = (tempfile::tempdir().unwrap(), device().work().beside);
        run::stage(Stage::Sft, &config, out.path(), &RunOptions { overwrite: true, ..Default::default() }).unwrap();
        assert_eq!(device().work().beside > before, ahead, "{more}");
        let adapter = std::fs::read(out.path().join("adapter/adapter_model.safetensors")).unwrap();
        assert!(*left.get_or_insert_with(|| adapter.clone()) == adapter, "{more}: other bytes");
    }
}
