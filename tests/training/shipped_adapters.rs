//! The adapters in adapters/quickstart are what their README says: they fit the embedded base, and the actor wins.

use std::path::Path;

use fourfold::model::generate::{FinishReason, SamplingParams, generate};
use fourfold::model::roles::{Policy, ValueModel};
use fourfold::model_files::ModelFiles;
use fourfold::quickstart::base::BASE;
use fourfold::quickstart::gold::gold;
use fourfold::quickstart::task::{Split, prompts};
use fourfold::run::Model;
use fourfold::tokenizer::SpecialTokens;

#[test]
fn shipped_actor_wins_against_shipped_sft_and_shipped_scorers_score() {
    let (config, generation) = (BASE.config, BASE.generation_config);
    let checkpoint =
        ModelFiles::from_embedded(config, generation, BASE.tokenizer, BASE.tokenizer_config, BASE.weights).unwrap();
    let model = Model::of(checkpoint).unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters/quickstart");
    let [sft, reward, actor, critic] =
        ["sft", "reward", "actor", "critic"].map(|role| model.adapter(&dir.join(role)).unwrap());
    assert!(ValueModel::new(&model.base, &reward).is_ok() && ValueModel::new(&model.base, &critic).is_ok());
    assert!(ValueModel::new(&model.base, &sft).is_err() && ValueModel::new(&model.base, &actor).is_err());

    let tokenizer = model.checkpoint.tokenizer();
    let rows = prompts(123, 96, Split::HeldOut);
    let asked: Vec<Vec<u32>> = rows.iter().map(|r| tokenizer.encode(&r.prompt, SpecialTokens::None).unwrap()).collect();
    let sampling = SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        max_new_tokens: 48,
        stop: tokenizer.eos_ids().to_vec(),
    };
    let seeds: Vec<u64> = (0..96).collect();
    let verdicts = |adapter| -> Vec<f64> {
        let responses = generate(Policy::new(&model.base, Some(adapter)), &asked, &seeds, &sampling, |_, _| {});
        let judged = responses
            .unwrap()
            .into_iter()
            .zip(&rows)
            .map(|(r, row)| gold(row, &tokenizer.decode(&r.tokens).unwrap(), r.finish == FinishReason::Stop).total);
        judged.collect()
    };
    let wins: f64 =
        verdicts(&actor).iter().zip(verdicts(&sft)).map(|(&a, s)| f64::from(a > s) + 0.5 * f64::from(a == s)).sum();
    // The run that made it won 92% of 256; 80% of 96 is more than five standard deviations below.
    assert!(wins / 96.0 > 0.8, "{}", wins / 96.0);
}
