//! The mixture with pretraining: what it teaches, and that without weight it is not there.

use fourfold::config::{Ppo, Ptx};
use fourfold::model::adapter::Adapter;
use fourfold::model::block::Recompute;
use fourfold::ppo;
use fourfold::ppo::train::{Start, Task, Trained};
use fourfold::sft::perplexity;
use fourfold::train::session::Session;

use super::world::*;

#[test]
fn text_is_kept_by_its_weight_and_a_weight_of_0_changes_nothing() {
    let model = model();
    let sft = sft_adapter(&model, 3, &mut Session::silent());
    let rm = reward_adapter(&model, &sft, 3, &mut Session::silent());
    let start = Start { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    let (prompts, source, text) = (questions(&model, 24), source_of(start), sft_examples(&model, 24));
    let run = |ptx: Option<Ptx>| -> Trained {
        let config = Ppo { ptx, ..ppo_config() };
        let task = Task {
            start,
            prompts: &prompts,
            stop: model.checkpoint.tokenizer().eos_ids(),
            source: &source,
            decode: &|_| String::new(),
            evaluation: None,
            ptx: config.ptx.as_ref().map(|_| &text as _),
            pad: None,
            recompute: Recompute::Off,
        };
        ppo::train::train(task, &config, 3, &mut Session::silent()).unwrap()
    };
    let of = |coef: f64, separate_step: bool| run(Some(Ptx { coef, separate_step, ..Ptx::default() }));
    let surprise = |adapter: &Adapter| perplexity(&model.base, adapter, &text).unwrap();
    let (without, zero) = (run(None), of(0.0, false));
    assert!(bits(&without.actor) == bits(&zero.actor), "the actor");
    assert!(!zero.last.contains_key("loss/ptx_avg"));
    let (joint, apart) = (of(27.8, false), of(27.8, true));
    for (name, trained) in [("joint", &joint), ("separate", &apart)] {
        assert!(trained.last["loss/ptx_avg"].as_f64().unwrap() > 0.0);
        let (with, before) = (surprise(&trained.actor), surprise(&without.actor));
        assert!(with < 0.98 * before, "{name}: the text's perplexity is {with}, without the mixture {before}");
    }
    assert!(bits(&joint.actor) != bits(&apart.actor));
    // Another weight is felt; the same run is the same bits.
    assert!(bits(&of(1.0, false).actor) != bits(&joint.actor) && bits(&of(27.8, false).actor) == bits(&joint.actor));
}
