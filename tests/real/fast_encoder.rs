//! The fast encoder over SmolLM2's vocabulary against the tokenizers crate.

use fourfold::model_files::ModelFiles;

use crate::encoders::assert_same_ids;
use crate::model::gguf;

#[test]
fn the_fast_encoder_equals_the_tokenizers_crate_over_smollm2s_vocabulary() {
    let Some(path) = gguf("the_fast_encoder_equals_the_tokenizers_crate_over_smollm2s_vocabulary") else { return };
    let corpus = [
        include_str!("../data/pipeline.rs"),
        include_str!("../golden/tokenizer_smollm2.json"),
        include_str!("../../README.md"),
    ];
    assert_same_ids(ModelFiles::open(&path).unwrap().tokenizer(), 4000, &corpus);
}
