//! Layers that a device does not keep: streamed and resident bases give the same bytes, a missing wait is seen, and each pass
//! copies the layers that it needs once.

use std::fs;
use std::sync::Arc;

use fourfold::config::{Ppo, RecomputeSetting, Sft};
use fourfold::device::emulated::Emulated;
use fourfold::device::{Device, Work};
use fourfold::model::adapter::{Adapter, LoraConfig, TargetModules};
use fourfold::model::base::Base;
use fourfold::model::batch::Batch;
use fourfold::model::block::Recompute;
use fourfold::model::generate::{Response, SamplingParams, generate};
use fourfold::model::roles::Policy;
use fourfold::ops::storage::dtype::StorageDType;
use fourfold::ops::weight::ComputeDtype;
use fourfold::report::Report;
use fourfold::run::Model;
use fourfold::sft;
use fourfold::train::session::Session;
use fourfold::train::supervised::Setup;
use serde_json::Value;

use crate::fault_world::{line, place};
use crate::parity::{Computed, compute};
use crate::ppo_world::*;
use crate::stages::{adapters, short_ppo};
use crate::support::Place;
use crate::world::{adapter, drawn, embedded, emulated, machine, say, timed};

pub const LAYERS: usize = 4;

/// The quickstart's base, of which the device does not keep `layers`.
pub fn base(device: &Device, layers: usize, compute: ComputeDtype, stored: Option<StorageDType>) -> Base {
    let base = embedded(LAYERS).quantised(stored).base().unwrap().computing_in(compute);
    base.streaming(Some(device.clone()), layers, |_, _| {}).unwrap()
}

fn model(device: &Device, layers: usize) -> Model {
    let model = model_of(LAYERS);
    Model { base: model.base.streaming(Some(device.clone()), layers, |_, _| {}).unwrap(), ..model }
}

pub fn sequences() -> Vec<Vec<u32>> {
    let of = |n: u32, step: u32| (0..n).map(|i| (i * step + 5) % 90 + 3).collect::<Vec<u32>>();
    vec![of(13, 17), of(2, 29), of(7, 7)]
}

fn responses(base: &Base, adapter: &Adapter) -> Vec<Response> {
    let sampling = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: 6, stop: vec![3, 9] };
    let prompts = sequences();
    generate(Policy::new(base, Some(adapter)), &prompts, &[5, 6, 7], &sampling, |_, _| {}).unwrap()
}

/// The bits of everything that a pass computes.
fn all_bits(of: &Computed) -> Vec<Vec<u32>> {
    let named = of.policy.iter().chain(&of.critic).map(|(_, values)| values);
    [&of.logprobs, &of.entropy, &of.kl, &of.values].into_iter().chain(named).map(|v| to_bits(v)).collect()
}

fn text_bits(of: &[Response]) -> Vec<(Vec<u32>, Vec<u32>)> {
    of.iter().map(|r| (r.tokens.clone(), to_bits(&r.logprobs))).collect()
}

#[test]
fn streamed_and_resident_passes_give_the_same_bytes() {
    // Its own: other tests copy layers to the one that they share.
    let Some((_machine, device)) = machine() else { return };
    let _time = timed("streamed passes");
    let (exact, half) = (ComputeDtype::F32, ComputeDtype::F16);
    for (compute_in, stored, counts) in [(exact, Some(StorageDType::Q8_0), &[1, 3, 4][..]), (half, None, &[4])] {
        let resident = base(&device, 0, compute_in, stored);
        assert!(!resident.streams() && resident.pinned_bytes() == 0);
        let whole = adapter(&resident, TargetModules::AllLinear, 2, 3);
        // Its backward ends above the first layers.
        let config = LoraConfig { r: 2, layers_to_transform: Some(vec![2, 3]), ..LoraConfig::default() };
        let upper = drawn(&Adapter::init(config, resident.shapes(), 4).unwrap(), 4);
        let results = |base: &Base| {
            let computed = |adapter: &Adapter, recompute| all_bits(&compute(base, adapter, &sequences(), recompute));
            let all = if compute_in == exact { &Recompute::ALL[..] } else { &[Recompute::Block] };
            let passes: Vec<_> = all.iter().map(|&recompute| computed(&whole, recompute)).collect();
            (passes, computed(&upper, Recompute::Off), text_bits(&responses(base, &whole)))
        };
        let want = results(&resident);
        assert!(want.0[0].iter().flatten().all(|&bits| f32::from_bits(bits).is_finite()));
        for &layers in counts {
            let streamed = base(&device, layers, compute_in, stored);
            assert_eq!((streamed.streams(), streamed.streamed_layers()), (true, layers));
            assert_eq!(streamed.fingerprint(), resident.fingerprint());
            // Of the layers alone: inputs of blocks come to it in the passes.
            let (before, pinned) = (device.work(), streamed.pinned_bytes());
            assert!(results(&streamed) == want, "{compute_in:?}, {layers} of {LAYERS} layers");
            let copied = (device.work() - before).streamed;
            // Two layers find room in the buffers and stay there.
            assert_eq!(copied > pinned, layers > 2, "{layers}: {copied}");
        }
    }
}

#[test]
fn a_wait_that_is_left_out_is_seen() {
    let Some((machine, device)) = machine() else { return };
    let streamed = base(&device, LAYERS, ComputeDtype::F32, None);
    let hidden = || {
        let hidden = streamed.hidden(&Batch::new(&sequences()).unwrap(), None).unwrap().to_host().unwrap();
        hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let want = hidden();
    assert!(want.iter().all(|v| v.is_finite()));
    machine.forget_arrivals(true);
    assert!(hidden().iter().any(|v| v.is_nan()), "a buffer that was not waited for holds NaN");
    machine.forget_arrivals(false);
    assert!(to_bits(&hidden()) == to_bits(&want));
}

#[test]
fn a_buffer_is_undefined_until_it_has_arrived_and_is_filled_only_when_it_was_released() {
    let Some((machine, device)) = machine() else { return };
    let contents = [3u8, 7].map(|byte| {
        let mut copy = device.host_copy(1024).unwrap();
        copy.content().unwrap().fill(byte);
        copy
    });
    let landing = device.landing(1024).unwrap();
    // SAFETY: the copies outlive the buffer.
    let fill = |which: usize| unsafe { landing.fill(&contents[which]) };
    fill(0).unwrap();
    assert_eq!(landing.buffer().to_bytes().unwrap(), [0xFF; 1024]);
    landing.arrive().unwrap();
    assert_eq!(landing.buffer().to_bytes().unwrap(), [3; 1024]);
    let error = format!("{:#}", fill(1).unwrap_err());
    assert!(error.contains("not released"), "{error}");
    landing.release().unwrap();
    fill(1).unwrap();
    assert_eq!(landing.buffer().to_bytes().unwrap(), [0xFF; 1024], "what it held is lost when the copy may begin");
    landing.arrive().unwrap();
    assert_eq!(landing.buffer().to_bytes().unwrap(), [7; 1024]);
    assert_eq!(device.work().streamed, 2 * 1024, "the refused one was not copied");
    drop(landing);
    assert_eq!(machine.live(), 0);
}

#[test]
fn each_pass_copies_its_layers_once_and_a_backward_begins_with_what_the_forward_left() {
    let device = Device::dry();
    let streamed = base(&device, LAYERS, ComputeDtype::F16, Some(StorageDType::Q8_0));
    let layer = streamed.pinned_bytes() / LAYERS;
    let actor = adapter(&streamed, TargetModules::AllLinear, 2, 3);
    let batch = Batch::new(&sequences()).unwrap();
    // Beyond what a first run finds in the buffers.
    let layers_of = |pass: &dyn Fn()| {
        pass();
        let before: Work = device.work();
        pass();
        let copied = (device.work() - before).streamed;
        assert!(copied.is_multiple_of(layer), "{copied} bytes in layers of {layer}");
        copied / layer
    };
    assert_eq!(layers_of(&|| drop(streamed.hidden(&batch, Some(&actor)).unwrap())), LAYERS);
    let (_, cache) = streamed.prefill(&batch, &[0, 1, 2], Some(&actor), 8).unwrap();
    let (cache, step) = (std::cell::RefCell::new(cache), std::cell::Cell::new(0));
    let decode = || {
        let positions = [13, 2, 7].map(|length| length + step.get());
        step.set(step.get() + 1);
        drop(streamed.decode(&[4, 5, 6], &positions, Some(&actor), &mut cache.borrow_mut()).unwrap());
    };
    assert_eq!(layers_of(&decode), LAYERS);
    // Two of four layers are there when the backward begins, and two when the next forward does.
    let step = || {
        let (h, tape) = streamed.forward(&batch, &actor, Recompute::Block).unwrap();
        drop(streamed.backward(&batch, &actor, tape, h).unwrap());
    };
    assert_eq!(layers_of(&step), 2 * LAYERS - 4);
}

#[test]
fn a_device_holds_two_buffers_and_none_of_the_streamed_layers() {
    let live = |layers: usize| {
        let device = Device::dry();
        let base = base(&device, layers, ComputeDtype::F16, None);
        // Each allocation counts as a multiple of 512 bytes.
        let apart = device.usage().live - base.bytes_on_device(layers);
        assert!(apart < 512 * device.usage().allocations, "{layers} layers: {apart} bytes more");
        base.bytes_on_device(layers)
    };
    let all = live(0);
    let layer = all - live(3);
    assert!(layer > 0 && live(1) == all && live(2) == all && live(4) == all - 2 * layer);
}

/// Metrics without times, and the bits of the adapters.
type Left = (Vec<Value>, Vec<std::collections::BTreeMap<String, Vec<u32>>>);

fn ran(run: impl FnOnce(&mut Session) -> Vec<Adapter>) -> Left {
    let dir = tempfile::tempdir().unwrap();
    let trained = run(&mut Session::new(Report::to_dir(dir.path()).unwrap()));
    (metrics(dir.path()), trained.iter().map(bits).collect())
}

fn ppo(policy: &Model, scorer: &Model, checkpoint: RecomputeSetting) -> Left {
    let (sft, rm) = adapters(policy);
    let roles = Roles { base: &policy.base, reward_base: &scorer.base, sft: &sft, reward: Some(&rm) };
    let config = Ppo { total_episodes: 4, response_length: 4, checkpoint, ..short_ppo() };
    ran(|session| {
        let trained = run_ppo(roles, policy, &config, 2, session);
        vec![trained.actor, trained.critic.unwrap()]
    })
}

fn short_sft(model: &Model, recompute: Recompute) -> Left {
    let (examples, start) = (sft_examples(model, 8), model.fresh_adapter(&lora(), 3).unwrap());
    let config = Sft { per_device_train_batch_size: 2, gradient_accumulation_steps: 2, ..sft_config() };
    let setup = Setup { base: &model.base, start: &start, recompute, seed: 3 };
    ran(|session| vec![sft::train(setup, &examples, &[], &config, session).unwrap().0])
}

#[test]
fn sft_and_ppo_over_streamed_bases_leave_the_same_bytes() {
    let Some(device) = emulated() else { return };
    let _time = timed("streamed stages");
    let (resident, streamed, some) = (model(&device, 0), model(&device, LAYERS), model(&device, 3));
    for recompute in Recompute::ALL {
        assert!(short_sft(&streamed, recompute) == short_sft(&resident, recompute), "sft, {recompute:?}");
    }
    // One base for all roles, and two.
    let settings = [RecomputeSetting::None, RecomputeSetting::Mlp, RecomputeSetting::Block, RecomputeSetting::Offload];
    for (checkpoint, other) in settings.into_iter().zip([&streamed, &some, &resident]) {
        let want = ppo(&resident, &resident, checkpoint);
        assert!(!want.0.is_empty() && want.1.len() == 2);
        assert!(ppo(&streamed, other, checkpoint) == want, "ppo, {checkpoint:?}");
    }
}

#[test]
fn a_fill_that_fails_ends_the_pass_with_an_error_and_the_next_pass_is_right() {
    let Some((machine, device)) = machine() else { return };
    let streamed = base(&device, LAYERS, ComputeDtype::F32, None);
    let actor = adapter(&streamed, TargetModules::AllLinear, 2, 3);
    let pass = || streamed.hidden(&Batch::new(&sequences()).unwrap(), Some(&actor));
    let want = pass().unwrap().to_host().unwrap();
    let bits = |t: &candle_core::Tensor| to_bits(&t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    let mut failed = 0;
    for moment in 0..40 {
        machine.fail_copy_after(Some(moment));
        let broken = pass();
        machine.fail_copy_after(None);
        failed += usize::from(broken.is_err());
        if let Err(error) = broken {
            assert!(format!("{error:#}").contains("as a test asked for"), "{error:#}");
        }
        assert!(bits(&pass().unwrap().to_host().unwrap()) == bits(&want), "after a copy failed at {moment}");
    }
    assert!(failed > LAYERS, "{failed}");
    let machine: Arc<Emulated> = machine;
    drop((streamed, actor, want));
    assert_eq!((machine.live(), device.usage().live), (0, 0), "all memory came back");
}

/// The trained adapter's bytes of a run's folder, and the line about offload.
fn left(place: &Place, stderr: &str) -> (Vec<u8>, Option<String>) {
    let bytes = fs::read(place.path("out/sft/adapter/adapter_model.safetensors")).unwrap();
    (bytes, stderr.lines().find(|line| line.starts_with("offload: ")).map(str::to_owned))
}

#[test]
fn a_run_with_auto_takes_as_few_layers_from_the_device_as_fit_and_says_so() {
    if emulated().is_none() {
        return;
    }
    let _time = timed("a run with offload = auto");
    let place = place();
    let run = |more: &str| {
        fs::remove_dir_all(place.path("out")).ok();
        place.run(&format!("{} --device emulated --set sft.checkpoint=\"block\" {more}", line("sft")))
    };
    let ran = run("");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let (want, none) = left(&place, &ran.stderr);
    assert_eq!(none, None);
    let planned = |more: &str| -> Value {
        let ran = place.run(&format!(
            "plan run.toml --phase sft --set data.path=sft.jsonl --device emulated --set sft.checkpoint=\"block\" --json {more}"
        ));
        assert!([0, 2].contains(&ran.code), "{}", ran.stderr);
        serde_json::from_str(&ran.stdout).unwrap()
    };
    let peak = |plan: &Value| plan["devices"]["emulated"]["total"].as_u64().unwrap();
    let (all, three, four) = (planned(""), planned("--set base.offload=3"), planned("--set base.offload=4"));
    assert!(peak(&all) > peak(&three) && peak(&three) > peak(&four), "{all} {three} {four}");
    assert_eq!(three["offload"]["layers"], 3);
    assert_eq!(4 * three["offload"]["pinned"].as_u64().unwrap(), 3 * four["offload"]["pinned"].as_u64().unwrap());
    assert!(three["peak"]["own"].as_u64() > all["peak"]["own"].as_u64(), "the host's plan counts pinned memory");
    // A plan keeps one part in 32 of the room free where it chooses.
    let context = all["devices"]["emulated"]["context"].as_u64().unwrap()
        + all["devices"]["emulated"]["workspace"].as_u64().unwrap();
    // Where the run fits, auto takes none.
    assert_eq!(planned("--set base.offload=\"auto\"")["offload"]["layers"], 0);
    let limit = |plan: &Value| format!("--set memory.device_limit={}", (peak(plan) - context) * 32 / 31 + 64 + context);
    for (layers, plan) in [(3, &three), (4, &four)] {
        let chosen = planned(&format!("{} --set base.offload=\"auto\"", limit(plan)));
        assert_eq!((&chosen["offload"]["layers"], &chosen["fits"]), (&layers.into(), &true.into()), "{chosen}");
        let change = planned(&limit(plan))["smallest_change"].clone();
        assert_eq!(change["set"]["base.offload"], "auto", "{change}");
    }
    let limit = limit(&three);
    let ran = run(&limit);
    assert!(ran.code == 2 && ran.stderr.contains("--set base.offload=auto"), "{}", ran.stderr);
    // As the plan's table counts, with what is beside the allocations.
    let in_words = |bytes: &str| fourfold::planner::plan::text(bytes.parse::<usize>().unwrap());
    let asked = in_words(limit.rsplit_once('=').unwrap().1);
    let (took, change) = (in_words(&peak(&all).to_string()), in_words(&peak(&three).to_string()));
    for said in [format!("would take {took} of"), format!("room for {asked}"), format!("fits, in {change} of")] {
        assert!(ran.stderr.contains(&said), "{said}: {}", ran.stderr);
    }
    let ran = run(&format!("{limit} --set base.offload=\"auto\""));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let (bytes, said) = left(&place, &ran.stderr);
    assert!(bytes == want, "other bytes");
    let said = said.unwrap_or_else(|| panic!("{}", ran.stderr));
    say(&said);
    assert!(said.starts_with("offload: 3 of 4 layers of the base are not kept by emulated, the fewest"), "{said}");
    // A finished run is known by its config, which says auto as it did.
    let ran = place.run(&format!(
        "{} --device emulated --set sft.checkpoint=\"block\" {limit} --set base.offload=\"auto\" --resume",
        line("sft")
    ));
    assert!(ran.code == 0 && ran.stderr.contains("this run is finished"), "{}", ran.stderr);
    let ran = run("--set base.offload=5");
    assert!(ran.code == 2 && ran.stderr.contains("more than the base's 4 layers"), "{}", ran.stderr);
    let ran = run("--set base.offload=\"some\"");
    assert!(ran.code == 2 && ran.stderr.contains("use \"auto\", \"none\" or a number of layers"), "{}", ran.stderr);
}
