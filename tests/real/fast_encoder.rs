//! The fast encoder over SmolLM2's vocabulary against the tokenizers crate.

use fourfold::model_files::ModelFiles;

use crate::encoders::assert_same_ids;
use crate::real_files::smollm2;

#[test]
#[ignore = "needs SmolLM2: FOURFOLD_SMOLLM2_GGUF=$(tests/fetch/fetch-smollm2.sh) cargo test --release --test real -- --ignored"]
fn the_fast_encoder_equals_the_tokenizers_crate_over_smollm2s_vocabulary() {
    let path = smollm2();
    let corpus = [
        include_str!("../data/pipeline.rs"),
        include_str!("../golden/tokenizer_smollm2.json"),
        include_str!("../../README.md"),
    ];
    assert_same_ids(ModelFiles::open(&path).unwrap().tokenizer(), 4000, &corpus);
}
