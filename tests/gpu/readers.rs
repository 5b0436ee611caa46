//! Several readers of one base in one pass: the bits of passes of their own, over resident and streamed layers; one copy of a
//! layer and one dequantisation of a matrix for all of them; PPO's scoring with them; and the plan that decides it.

use std::collections::BTreeMap;

use fourfold::config::{AdvantageEstimator, ImportanceSamplingCorrection, KlEstimator, Ppo};
use fourfold::device::{Device, Element, Work};
use fourfold::model::adapter::{Adapter, TargetModules};
use fourfold::model::base::Base;
use fourfold::model::batch::Batch;
use fourfold::model::generate::{FinishReason, Response};
use fourfold::model::init::dora::with_magnitudes;
use fourfold::model::readers::{Reader, Sharing};
use fourfold::model::roles::{Policy, ValueModel};
use fourfold::ops::storage::dtype::StorageDType;
use fourfold::ops::weight::ComputeDtype;
use fourfold::ppo::rollout::{Readers, Rollout, read};
use fourfold::ppo::train::train;
use fourfold::report::Report;
use fourfold::reward::source::combine::{Aggregate, Ensemble, Part, WeightedSum};
use fourfold::reward::source::{RewardModel, RewardSource};
use fourfold::run::Model;
use fourfold::train::adamw::AdamWConfig;
use fourfold::train::learner::Learner;
use fourfold::train::session::Session;
use fourfold::train::world::World;
use serde_json::Value;

use crate::fault_world::{place, run_all};
use crate::parity::{families, golden};
use crate::ppo_world::*;
use crate::stages::{adapters, short_ppo};
use crate::streaming::{LAYERS, base};
use crate::tiny_decoders::open;
use crate::world::{adapter, emulated, machine, timed};

/// The golden sequences until they have more tokens than products straight from the stored bytes take.
pub fn long(sequences: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let each = sequences.iter().map(Vec::len).sum::<usize>().max(1);
    sequences.iter().cycle().take(sequences.len() * (64 / each + 1)).cloned().collect()
}

/// The bits that each reader finds.
fn bits_of(base: &Base, batch: &Batch, readers: &[Reader<'_>], sharing: Sharing) -> Vec<Vec<u32>> {
    let mut all = vec![];
    let found = base.read(batch, readers, sharing, |i, rows| {
        assert_eq!((i, rows.dims2()?.0), (all.len(), readers[i].rows.len()));
        all.push(to_bits(&rows.to_host()?.flatten_all()?.to_vec1::<f32>()?));
        Ok(())
    });
    found.unwrap_or_else(|e| panic!("{e:#}"));
    all
}

fn assert_same(name: &str, opened: impl Fn() -> Base, device: &Device, adapters: &[&Adapter], sequences: &[Vec<u32>]) {
    let batch = Batch::new(sequences).unwrap();
    let (all, some): (Vec<usize>, Vec<usize>) = ((0..batch.tokens().len()).collect(), batch.last_rows());
    let rows = [&all, &some].into_iter().cycle();
    let adapters = [None].into_iter().chain(adapters.iter().map(|&a| Some(a)));
    let readers: Vec<Reader<'_>> = adapters.zip(rows).map(|(adapter, rows)| Reader { adapter, rows }).collect();
    // Matrices of f32 are read in place in f32, and dequantised in f16.
    for (compute, sharing) in [(ComputeDtype::F32, Sharing::Blocks), (ComputeDtype::F16, Sharing::Weights)] {
        let base =
            |layers: usize| opened().computing_in(compute).streaming(Some(device.clone()), layers, |_, _| {}).unwrap();
        let (resident, streamed) = (base(0), base(opened().config().num_hidden_layers));
        let want = bits_of(&resident, &batch, &readers, Sharing::Apart);
        assert!(want.iter().flatten().all(|&bits| f32::from_bits(bits).is_finite()), "{name}");
        assert!(want[0] != want[2] && want.len() == readers.len(), "{name}: adapters differ");
        for base in [&resident, &streamed] {
            assert!(bits_of(base, &batch, &readers, sharing) == want, "{name}, {compute:?}, {sharing:?}");
        }
    }
}

#[test]
fn readers_of_every_family_find_the_bits_of_passes_of_their_own() {
    let Some((_machine, device)) = machine() else { return };
    let _time = timed("readers of the families");
    for path in families() {
        let opened = open(&path);
        let [one, two] = [5, 6].map(|seed| adapter(&opened.base, TargetModules::AllLinear, 2, seed));
        assert_same(&path, || open(&path).base, &device, &[&one, &two], &long(&opened.golden.sequences));
    }
}

#[test]
fn readers_with_dora_and_with_lora_on_both_ends_find_the_bits_of_passes_of_their_own() {
    let Some((_machine, device)) = machine() else { return };
    for folder in golden("lora_targets", "") {
        let name = folder.file_name().unwrap().to_str().unwrap();
        let path = format!("lora_targets/{name}/golden.safetensors");
        let opened = open(&path);
        let loaded = Adapter::load(&folder, opened.base.shapes()).unwrap();
        let other = adapter(&opened.base, TargetModules::AllLinear, 2, 6);
        let dora = with_magnitudes(&other, &opened.base).unwrap();
        assert_same(name, || open(&path).base, &device, &[&loaded, &dora], &long(&opened.golden.sequences));
    }
}

/// Batches of this base are dequantised.
pub fn quantised(device: &Device, layers: usize) -> (Base, Batch) {
    let of = |n: u32, step: u32| (0..n).map(|i| (i * step + 5) % 90 + 3).collect::<Vec<u32>>();
    let base = base(device, layers, ComputeDtype::F16, Some(StorageDType::Q8_0));
    (base, Batch::new(&[of(40, 17), of(2, 29), of(33, 7)]).unwrap())
}

#[test]
fn readers_share_the_copies_of_streamed_layers_and_the_dequantised_matrices() {
    let device = Device::dry();
    let (streamed, batch) = quantised(&device, LAYERS);
    let layer = streamed.pinned_bytes() / LAYERS;
    let all: Vec<Adapter> = (3..6).map(|seed| adapter(&streamed, TargetModules::AllLinear, 2, seed)).collect();
    let last = batch.last_rows();
    let readers: Vec<Reader<'_>> = all.iter().map(|a| Reader { adapter: Some(a), rows: &last }).collect();
    let matrices = streamed.shapes().linears().len();
    // Beyond what a first run finds.
    let of = |sharing: Sharing| {
        let run = || streamed.read(&batch, &readers, sharing, |_, _| Ok(())).unwrap();
        run();
        let before: Work = device.work();
        run();
        let work = device.work() - before;
        device.begin_profile().unwrap();
        run();
        let kernels = device.end_profile().unwrap();
        let dequantised = kernels.iter().filter(|kernel| kernel.name.starts_with("dequantise_"));
        (work.streamed, dequantised.map(|kernel| kernel.calls).sum::<usize>(), work.launches)
    };
    let [apart, blocks, weights] = Sharing::ALL.map(of);
    assert_eq!((apart.0, apart.1), (3 * LAYERS * layer, 3 * LAYERS * matrices));
    assert_eq!(blocks, (LAYERS * layer, apart.1, apart.2), "the same launches");
    assert_eq!(weights, (LAYERS * layer, LAYERS * matrices, apart.2 - 2 * LAYERS * matrices));
}

#[test]
fn the_device_holds_the_hidden_states_of_all_readers_and_a_blocks_dequantised_weights() {
    let device = Device::dry();
    let (base, batch) = quantised(&device, 0);
    let all: Vec<Adapter> = (3..6).map(|seed| adapter(&base, TargetModules::AllLinear, 2, seed)).collect();
    let last = batch.last_rows();
    let readers: Vec<Reader<'_>> = all.iter().map(|a| Reader { adapter: Some(a), rows: &last }).collect();
    let peak = |sharing: Sharing| {
        base.read(&batch, &readers, sharing, |_, _| Ok(())).unwrap();
        device.reset_peak();
        base.read(&batch, &readers, sharing, |_, _| Ok(())).unwrap();
        device.usage().peak
    };
    let [apart, blocks, weights] = Sharing::ALL.map(peak);
    let config = base.config();
    let hidden = (batch.tokens().len() * config.hidden_size * 4).next_multiple_of(512);
    assert_eq!(blocks, apart + 2 * hidden);
    let shapes = base.shapes();
    let sizes = shapes.linears().iter().map(|map| map.out_features * map.in_features * Element::F16.bytes());
    let sizes: Vec<usize> = sizes.collect();
    // A matrix at a time has a scratch matrix anyway.
    let (sum, largest) = (sizes.iter().sum::<usize>(), *sizes.iter().max().unwrap());
    assert!(weights > blocks && weights <= blocks + sum - sizes.iter().min().unwrap(), "{weights} {blocks} {sum}");
    assert!(weights >= blocks + sum - 2 * largest, "{weights} {blocks} {sum} {largest}");
}

fn two_reward_models(base: &Base) -> [Adapter; 2] {
    [8, 9].map(|seed| adapter(base, TargetModules::AllLinear, 2, seed).with_head(seed).unwrap())
}

/// One rollout that is read by all roles.
fn scored(
    (policy, scorer): (&Base, &Base),
    sharing: Sharing,
    (exact_kl, recomputes): (bool, bool),
    source: &dyn RewardSource,
) -> Rollout {
    let all = |seed| adapter(policy, TargetModules::AllLinear, 2, seed);
    let (actor, reference) = (all(1), all(2));
    let critic = adapter(scorer, TargetModules::AllLinear, 3, 4).with_head(5).unwrap();
    let critic = Learner::new(critic.to_trainable(), AdamWConfig::default(), 0.0).unwrap();
    let of = |n: u32, step: u32| (0..n).map(|i| (i * step + 5) % 90 + 3).collect::<Vec<u32>>();
    let response =
        |tokens: Vec<u32>| Response { logprobs: vec![-1.0; tokens.len()], tokens, finish: FinishReason::Length };
    let readers = Readers {
        reference: Some(Policy::new(policy, Some(&reference))),
        critic: Some((scorer, &critic)),
        exact_kl,
        last_values: exact_kl,
        source,
        entries: &[],
        decode: &|_| String::new(),
        recomputes,
        pad: None,
        sharing,
        world: World::alone(),
    };
    let (prompts, responses) = ([of(40, 17), of(33, 7)].to_vec(), [of(5, 3), of(9, 11)].map(response).to_vec());
    read(Policy::new(policy, Some(&actor)), readers, prompts, responses, 0.9).unwrap()
}

fn text(rollout: &Rollout) -> (Value, Vec<Vec<u32>>) {
    (serde_json::to_value(rollout).unwrap(), rollout.ref_hidden.iter().map(|rows| to_bits(rows)).collect())
}

#[test]
fn a_rollout_is_scored_with_the_same_bits_by_roles_that_share_and_by_roles_apart() {
    let Some((_machine, device)) = machine() else { return };
    let (streamed, resident) = (quantised(&device, LAYERS).0, quantised(&device, 0).0);
    for bases in [(&resident, &resident), (&streamed, &resident)] {
        let [one, two] = two_reward_models(bases.1);
        let model = |adapter| RewardModel(ValueModel::new(bases.1, adapter).unwrap());
        let boxed = |adapter| Box::new(model(adapter)) as Box<dyn RewardSource + '_>;
        let ensemble = || Ensemble::new(vec![boxed(&one), boxed(&two)], Aggregate::MeanMinusStd(0.5));
        let part = |name: &str, source| Part { name: name.into(), weight: 0.5, weight_end: None, source };
        let sum = || WeightedSum::new(vec![part("all", Box::new(ensemble())), part("one", boxed(&one))]);
        // The exact KL and the actor's log-probabilities again, or neither; several reward models, or one.
        for asked in [(true, true), (false, false)] {
            let source: Box<dyn RewardSource + '_> = if asked.0 { Box::new(sum()) } else { Box::new(model(&one)) };
            let want = text(&scored(bases, Sharing::Apart, asked, &*source));
            for sharing in [Sharing::Blocks, Sharing::Weights] {
                assert!(text(&scored(bases, sharing, asked, &*source)) == want, "{asked:?}, {sharing:?}");
            }
        }
    }
}

#[test]
fn a_rollout_is_scored_with_one_copy_of_each_streamed_layer() {
    let device = Device::dry();
    let (streamed, _) = quantised(&device, LAYERS);
    let layer = streamed.pinned_bytes() / LAYERS;
    let [one, _] = two_reward_models(&streamed);
    let source = RewardModel(ValueModel::new(&streamed, &one).unwrap());
    let copied = |sharing: Sharing| {
        scored((&streamed, &streamed), sharing, (true, true), &source);
        let before = device.work();
        scored((&streamed, &streamed), sharing, (true, true), &source);
        (device.work() - before).streamed / layer
    };
    // Actor, reference, critic, reward model.
    assert_eq!(Sharing::ALL.map(copied), [4 * LAYERS, LAYERS, LAYERS]);
    // The host's passes are those of before whatever is asked for.
    let host = base_on_host();
    let [one, _] = two_reward_models(&host);
    let source = RewardModel(ValueModel::new(&host, &one).unwrap());
    let of = |sharing| text(&scored((&host, &host), sharing, (true, true), &source));
    assert!(of(Sharing::Weights) == of(Sharing::Apart));
}

fn base_on_host() -> Base {
    crate::world::embedded(2).base().unwrap()
}

/// Metrics without times, and the bits of the adapters that a run leaves.
pub type Left = (Vec<Value>, Vec<BTreeMap<String, Vec<u32>>>);

pub fn ran(model: &Model, config: &Ppo, sharing: Sharing) -> Left {
    let (sft, rm) = adapters(model);
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    let (prompts, source, dir) = (questions(model, 24), source_of(roles), tempfile::tempdir().unwrap());
    let stop = model.checkpoint.tokenizer().eos_ids();
    let run = ppo_run(roles, &prompts, stop, &source, config, 2);
    let run = fourfold::ppo::run::PpoRun { sharing, ..run };
    let trained = train(&run, &mut Session::new(Report::to_dir(dir.path()).unwrap())).unwrap();
    let adapters = [&trained.actor].into_iter().chain(&trained.critic).map(bits).collect();
    (metrics(dir.path()), adapters)
}

#[test]
fn runs_whose_roles_share_leave_the_bytes_of_runs_whose_roles_do_not() {
    let Some(device) = emulated() else { return };
    let _time = timed("runs whose roles share");
    let on = |layers: usize| {
        let model = model_of(2).computing_in(ComputeDtype::F16);
        Model { base: model.base.streaming(Some(device.clone()), layers, |_, _| {}).unwrap(), ..model }
    };
    let (resident, streamed) = (on(0), on(2));
    let short = Ppo { total_episodes: 4, response_length: 4, ..short_ppo() };
    let exact = Ppo {
        kl_estimator: KlEstimator::Exact,
        importance_sampling_correction: ImportanceSamplingCorrection::TokenTruncate,
        ..short.clone()
    };
    let grpo = Ppo { advantage_estimator: AdvantageEstimator::Grpo, num_generations: 2, ..short.clone() };
    for config in [short, exact, grpo] {
        let want = ran(&resident, &config, Sharing::Apart);
        assert!(!want.0.is_empty());
        assert!(ran(&resident, &config, Sharing::Weights) == want, "{config:?}");
        assert!(ran(&streamed, &config, Sharing::Blocks) == want, "{config:?}");
        assert!(ran(&streamed, &config, Sharing::Weights) == want, "{config:?}");
    }
}

/// Without a limit roles share what leaves the peak where it is, and with one what fits.
#[test]
fn a_plan_shares_what_fits() {
    if emulated().is_none() {
        return;
    }
    let place = place();
    let of = |more: &str| -> Value {
        let ran = place.run(&format!(
            "plan run.toml --phase ppo --set data.path=prompts.jsonl --device emulated --json \
             --set base.quantize=q8_0 --set base.compute_dtype=f16 {more}"
        ));
        assert!([0, 2].contains(&ran.code), "{}", ran.stderr);
        serde_json::from_str::<Value>(&ran.stdout).unwrap()["devices"]["emulated"].clone()
    };
    let plan = |more: &str| of(&format!("--set base.dequantise=in_turn {more}"));
    // Before the adapters are there, they are planned as those that a run has: the reference's and the reward model's apart.
    let wide = "--set ppo.micro_batch_size=4 --set ppo.checkpoint=none";
    let before = plan(wide);
    run_all(&place, &["sft", "reward"]);
    let wide = plan(wide);
    assert_eq!(before, wide);
    assert_eq!((&wide["roles_share"], &wide["peak"]["phase"]), (&"weights".into(), &"update".into()), "{wide}");
    // Sequences that are trained on one by one: scoring, which takes many, has the peak.
    let narrow = "--set ppo.batch_size=12 --set ppo.micro_batch_size=1 --set ppo.checkpoint=block";
    let apart = plan(narrow);
    assert_eq!((&apart["roles_share"], &apart["peak"]["phase"]), (&"nothing".into(), &"scoring".into()), "{apart}");
    let beside = apart["context"].as_u64().unwrap() + apart["workspace"].as_u64().unwrap();
    let peak = |plan: &Value| plan["peak"]["bytes"].as_u64().unwrap();
    let limited = |room: u64| plan(&format!("{narrow} --set memory.device_limit={}", room + beside));
    let weights = limited(2 * peak(&apart));
    assert_eq!(weights["roles_share"], "weights", "{weights}");
    // One part in 32 stays free.
    let blocks = limited(peak(&weights));
    assert_eq!(blocks["roles_share"], "blocks", "{blocks}");
    let nothing = limited(peak(&blocks));
    assert_eq!((&nothing["roles_share"], peak(&nothing)), (&"nothing".into(), peak(&apart)), "{nothing}");
    assert!(peak(&weights) > peak(&blocks) && peak(&blocks) > peak(&apart));
    // Roles that share streamed layers save more time than weights that are dequantised ahead: those come after them.
    let streamed = |more: &str| of(&format!("{narrow} --set base.offload=2 {more}"));
    let room = |bytes: u64| format!("--set memory.device_limit={}", bytes * 32 / 31 + 64 + beside);
    let sharing = (1..64).map(|part| 2 * peak(&apart) * part / 64);
    let alone = sharing.map(|bytes| streamed(&format!("--set base.dequantise=in_turn {}", room(bytes))));
    let alone = alone.into_iter().find(|plan| plan["roles_share"] == "blocks").expect("a room where blocks are shared");
    let limit = room(peak(&alone));
    let kept = streamed(&format!("--set base.dequantise=kept {limit}"));
    assert_eq!(
        (&kept["roles_share"], peak(&kept) < peak(&alone)),
        (&"nothing".into(), true),
        "both are not possible: {kept}"
    );
    let open = streamed(&limit);
    assert_eq!((&open["roles_share"], &open["dequantise"]["base"]), (&"blocks".into(), &"in_turn".into()), "{open}");
}
