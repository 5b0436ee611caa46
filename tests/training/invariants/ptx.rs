//! The pretraining mixture: it lowers the text's perplexity, and a weight of 0 disables it.

use fourfold::config::{Ppo, Ptx};
use fourfold::data::examples::PassSize;
use fourfold::model::adapter::Adapter;
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::train::{Trained, train};
use fourfold::sft::perplexity;
use fourfold::train::session::Session;

use super::world::*;

#[test]
fn the_mixture_lowers_the_texts_perplexity_and_a_weight_of_0_changes_nothing() {
    let model = model();
    let sft = sft_adapter(&model, 3, &mut Session::silent());
    let rm = reward_adapter(&model, &sft, 3, &mut Session::silent());
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    let (prompts, source, text) = (questions(&model, 24), source_of(roles), sft_examples(&model, 24));
    let run = |ptx: Option<Ptx>| -> Trained {
        let config = Ppo { ptx, ..ppo_config() };
        let stop = model.checkpoint.tokenizer().eos_ids();
        let run = ppo_run(roles, &prompts, stop, &source, &config, 3);
        let ptx = config.ptx.as_ref().map(|_| &text as _);
        train(&PpoRun { ptx, ..run }, &mut Session::silent()).unwrap()
    };
    let of = |coef: f64, separate_step: bool| run(Some(Ptx { coef, separate_step, ..Ptx::default() }));
    let text_perplexity = |adapter: &Adapter| perplexity(&model.base, adapter, &text, PassSize::of(8)).unwrap();
    let (without, zero) = (run(None), of(0.0, false));
    assert!(bits(&without.actor) == bits(&zero.actor), "the actor");
    assert!(!zero.last.contains_key("loss/ptx_avg"));
    let (joint, apart) = (of(27.8, false), of(27.8, true));
    for (name, trained) in [("joint", &joint), ("separate", &apart)] {
        assert!(trained.last["loss/ptx_avg"].as_f64().unwrap() > 0.0);
        let (with, before) = (text_perplexity(&trained.actor), text_perplexity(&without.actor));
        assert!(with < 0.98 * before, "{name}: the text's perplexity is {with}, without the mixture {before}");
    }
    assert!(bits(&joint.actor) != bits(&apart.actor));
    // Another weight gives other bits; the same run gives the same bits.
    assert!(bits(&of(1.0, false).actor) != bits(&joint.actor) && bits(&of(27.8, false).actor) == bits(&joint.actor));
}
