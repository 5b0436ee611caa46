//! `doctor`: it compares every storage type and the passes of a whole model on a device with the CPU, and says in one object
//! what a card that cannot be used lacks.

use std::process::{Command, Output};

use fourfold::ops::weight::StorageDType;
use serde_json::Value;

use crate::world::{emulated, timed};

fn doctor(device: &str) -> (Output, Value) {
    let command = ["doctor", "--device", device, "--json"];
    let output = Command::new(env!("CARGO_BIN_EXE_fourfold")).args(command).output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let found = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text:?} {output:?}"));
    (output, found)
}

#[test]
fn doctor_compares_every_storage_type_and_the_passes_of_a_model() {
    let Some(_) = emulated() else { return };
    let _time = timed("doctor");
    let (output, found) = doctor("emulated");
    assert_eq!(output.status.code(), Some(0), "{found}");
    assert_eq!(found["usable"], true);
    let checks = found["checks"].as_array().unwrap();
    assert!(checks.iter().all(|check| check["good"] == true && check["error"].is_null()), "{found}");
    let has = |name: &str| checks.iter().any(|check| check["name"] == name);
    for dtype in StorageDType::ALL {
        assert!(has(&format!("unpacking {}", dtype.name())), "{} is not compared", dtype.name());
    }
    for dtype in ["f32", "bf16", "f16"] {
        for what in [
            "log-probabilities",
            "exact KL",
            "gradients of a policy",
            "gradients of a value model",
            "weights dequantised beside products",
            "a cache in q8_0",
        ] {
            assert!(has(&format!("{what} in {dtype}")), "{what} in {dtype} are not compared");
        }
    }
    assert!(has("a greedy response in f32"));
    assert!(has("tokens drawn from the same logits"));
    // Twelve tokens of three responses in three types, with each type of cache: one step as it is, one recorded, the others
    // replayed.
    assert_eq!(found["replayed_steps"], 2 * 3 * 9, "{found}");
}

/// Without a driver it is the driver that is missing, with one it is the card: in both cases the device is not usable.
#[test]
fn doctor_says_what_a_card_lacks_that_cannot_be_used() {
    let (output, found) = doctor("cuda:99");
    assert_eq!(output.status.code(), Some(1), "{found}");
    assert_eq!((&found["usable"], &found["device"]), (&Value::Bool(false), &Value::from("cuda:99")));
    let missing = found["missing"].as_str().unwrap();
    assert!(missing.contains("cuda:99") && missing.len() > 60, "{missing}");
    assert!(String::from_utf8(output.stderr).unwrap().contains("cannot be used"));
}
