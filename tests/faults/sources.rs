//! A reward program that dies in the middle of a run.

use std::fs;

use crate::support::Place;
use crate::world::{line, place, results, run_all};

/// Scores by the text; dies after LAST answers, for good, unless there is a file `mended`. Six are the two of the evaluation
/// before training and the first rollout.
const JUDGE: &str = r#"
[[ppo.reward]]
kind = "command"
retries = 1
command = ["sh", "-c", '''
n=0
while read -r line; do
  n=$((n+1))
  if [ $n -gt LAST ] && [ ! -e mended ]; then touch dead; fi
  if [ -e dead ]; then exit 1; fi
  printf '%s' "$line" | tr -dc a-m | wc -c
done
''']
"#;

/// Without a critic, with the exact KL in the loss and a penalty that is adapted: state that the other runs have not.
const OPTIONS: &str = "--set ppo.advantage_estimator=\"rloo\" --set ppo.num_generations=2 --set ppo.kl_estimator=\"exact\" \
                       --set ppo.kl_in=\"loss\" --set ppo.policy_loss=\"kl_penalty\" --set checkpoint.save_total_limit=99";

fn with_judge(last: usize) -> Place {
    let place = place();
    run_all(&place, &["sft", "reward"]);
    let config = fs::read_to_string(place.path("run.toml")).unwrap();
    place.write("run.toml", config + &JUDGE.replace("LAST", &last.to_string()));
    place
}

#[test]
fn a_reward_program_that_dies_stops_the_run_with_its_state_kept_and_mended_it_ends_with_the_same_weights() {
    let (whole, broken) = (with_judge(6), with_judge(6));
    let line = format!("{} {OPTIONS}", line("ppo"));
    whole.write("mended", "");
    let ran = whole.run(&line);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let ran = broken.run(&line);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    for said in ["all before it is kept in", "--resume", "reward command \"sh\""] {
        assert!(ran.stderr.contains(said), "{said}: {}", ran.stderr);
    }
    // Still dead: the run stops again, where it stood.
    assert_eq!(broken.run(&format!("{line} --resume")).code, 1);
    fs::remove_file(broken.path("dead")).unwrap();
    broken.write("mended", "");
    let ran = broken.run(&format!("{line} --resume"));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let same = |name: &str| !name.starts_with("critic") && name != "metrics.jsonl";
    for ((name, a), (_, b)) in results(&whole, "ppo").into_iter().zip(results(&broken, "ppo")) {
        assert!(!same(&name) || (!a.is_empty() && a == b), "{name} differs");
    }
    // The metrics tell of the tries that failed, and the counts outlive the processes.
    let metrics = fs::read_to_string(broken.path("out/ppo/metrics.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    let tries = last.as_object().unwrap().iter().find(|(key, _)| key.ends_with("/failed_tries")).unwrap().1;
    assert_eq!(tries.as_u64(), Some(4), "two tries in each of two processes: {last}");
    // Without a fault, to the very metrics from any checkpoint.
    let expected = results(&whole, "ppo");
    for step in [1, 5, 9] {
        let ran = whole.run(&format!("{line} --resume out/ppo/checkpoints/checkpoint-{step}"));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        for ((name, a), (_, b)) in expected.iter().zip(results(&whole, "ppo")) {
            assert!(*a == b, "from {step}: {name} differs");
        }
    }
}

#[test]
fn a_reward_program_that_dies_in_an_evaluation_loses_nothing_either() {
    // Two answers before training, three rollouts of four, and two in the evaluation after the second of them.
    for (last, what) in [(10, "during the run"), (16, "after it")] {
        let (whole, broken) = (with_judge(last), with_judge(last));
        let line = format!("{} {OPTIONS} --set checkpoint.save_steps=0", line("ppo"));
        whole.write("mended", "");
        let ran = whole.run(&line);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let ran = broken.run(&line);
        assert_eq!(ran.code, 1, "{what}: {}", ran.stderr);
        assert!(ran.stderr.contains("all before it is kept in"), "{what}: {}", ran.stderr);
        let told = || fs::read_to_string(broken.path("out/ppo/metrics.jsonl")).unwrap().lines().count();
        assert_eq!(told(), if last == 10 { 1 } else { 3 }, "{what}: the iterations that were over");
        fs::remove_file(broken.path("dead")).unwrap();
        broken.write("mended", "");
        let ran = broken.run(&format!("{line} --resume"));
        assert_eq!(ran.code, 0, "{what}: {}", ran.stderr);
        for ((name, a), (_, b)) in results(&whole, "ppo").into_iter().zip(results(&broken, "ppo")) {
            let same = !name.starts_with("critic") && name != "metrics.jsonl";
            assert!(!same || (!a.is_empty() && a == b), "{what}: {name} differs");
        }
        assert_eq!(told(), 3);
    }
}
