//! Reward sources that fail in the middle of a run: programs, services, and the judges of evaluations.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::Place;
use crate::world::{assert_same, line, place, results, run_all};

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

/// What is judged by besides, during the run: dead, it ends the run as a dead reward does, the iteration's rollout in hand.
const GOLD: &str = r#"
[ppo.gold]
kind = "command"
retries = 0
command = ["sh", "-c", '''
n=0
while read -r line; do
  n=$((n+1))
  if [ $n -gt 2 ] && [ ! -e mended ]; then exit 1; fi
  printf '%s' "$line" | tr -dc a-m | wc -c
done
''']
"#;

#[test]
fn a_judge_that_dies_in_an_evaluation_loses_no_iteration() {
    let (whole, broken) = (place(), place());
    for place in [&whole, &broken] {
        run_all(place, &["sft", "reward"]);
        // No checkpoint of its own accord: what is kept is kept for the dead judge.
        let config = fs::read_to_string(place.path("run.toml")).unwrap().replace("save_steps = 1", "save_steps = 0");
        place.write("run.toml", config + GOLD);
    }
    whole.write("mended", "");
    run_all(&whole, &["ppo"]);
    let ran = broken.run(&line("ppo"));
    assert!(ran.code == 1 && ran.stderr.contains("all before it is kept in"), "{}", ran.stderr);
    let metrics = || fs::read_to_string(broken.path("out/ppo/metrics.jsonl")).unwrap().lines().count();
    assert_eq!(metrics(), 1, "it died in the second iteration");
    broken.write("mended", "");
    let ran = broken.run(&format!("{} --resume", line("ppo")));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_same(&whole, &broken, "ppo", "after the judge came back");
}

/// The JSON body of a request.
fn asked(stream: &TcpStream) -> serde_json::Value {
    let mut reader = BufReader::new(stream);
    let (mut length, mut line) = (0, String::new());
    while reader.read_line(&mut line).unwrap() > 2 {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        line.clear();
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body).unwrap()
}

/// Answers every question with the same scores, once it is there.
fn serve(listener: TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let asked = asked(&stream);
        let lengths = asked["responses"].as_array().unwrap().iter().map(|r| r.as_str().unwrap().len() % 7);
        let body = serde_json::json!({"scores": lengths.collect::<Vec<_>>()}).to_string();
        write!(stream, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    }
}

#[test]
fn a_reward_service_that_is_not_there_stops_the_run_before_anything_is_lost_and_back_again_it_goes_on() {
    let place = place();
    run_all(&place, &["sft", "reward"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let config = fs::read_to_string(place.path("run.toml")).unwrap();
    let part = format!("\n[[ppo.reward]]\nkind = \"http\"\nurl = \"http://{address}/score\"\nretries = 1\n");
    place.write(
        "run.toml",
        config.replace("eval_every = 2", "eval_every = 0").replace("eval_prompts = 2", "eval_prompts = 0") + &part,
    );
    let ran = place.run(&line("ppo"));
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    for said in [
        "stopped after 0 steps",
        "all before it is kept in",
        "--force",
        &format!("reward endpoint http://{address}/score"),
    ] {
        assert!(ran.stderr.contains(said), "{said}: {}", ran.stderr);
    }
    // Another weight is another reward: it is refused, and named once.
    let config = fs::read_to_string(place.path("run.toml")).unwrap();
    place.write("run.toml", config.replace("retries = 1\n", "retries = 1\nweight = 2.0\n"));
    let ran = place.run(&format!("{} --resume", line("ppo")));
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    let said = "ppo.reward[0].weight: 1.0 -> 2.0; put them back, or go on with --force";
    assert!(ran.stderr.contains(said) && ran.stderr.matches("ppo.reward").count() == 1, "{}", ran.stderr);
    // Another place and more tries are not.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let now = listener.local_addr().unwrap();
    let moved = config.replace(&format!("//{address}/"), &format!("//{now}/"));
    place.write("run.toml", moved.replace("retries = 1\n", "retries = 2\nfallback_score = 0.0\n"));
    std::thread::spawn(move || serve(listener));
    let ran = place.run(&format!("{} --resume", line("ppo")));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for key in ["url: ", "retries: 1 -> 2", "fallback_score: unset -> 0.0"] {
        assert!(ran.stderr.contains(&format!(": ppo.reward[0].{key}")), "{key}: {}", ran.stderr);
    }
    let metrics = fs::read_to_string(place.path("out/ppo/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 3);
    assert!(
        metrics.lines().last().unwrap().contains("/failed_tries\":2"),
        "the tries before it came back are counted: {metrics}"
    );
}

/// A reward model behind vLLM's `/pooling`. Once `last` requests have been replied to, it replies `wrong` to each.
fn pooling_server(last: usize, wrong: impl Fn() -> String + Send + 'static) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/pooling", listener.local_addr().unwrap());
    let left = Arc::new(AtomicUsize::new(last));
    let count = left.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let asked = asked(&stream);
            if count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_err() {
                let _ = stream.write_all(wrong().as_bytes());
                continue;
            }
            let score = |ids: &serde_json::Value| {
                ids.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).sum::<u64>() % 9
            };
            let entry = |(index, ids)| serde_json::json!({ "index": index, "object": "pooling", "data": [score(ids)] });
            let data: Vec<_> = asked["input"].as_array().unwrap().iter().enumerate().map(entry).collect();
            let body = serde_json::json!({ "object": "list", "model": "rm", "data": data }).to_string();
            let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).unwrap();
        }
    });
    (url, left)
}

#[test]
fn a_reward_models_server_that_replies_wrongly_stops_the_run_with_its_state_kept_and_mended_it_ends_with_the_same_weights()
 {
    let with = |url: &str| {
        let place = place();
        run_all(&place, &["sft", "reward"]);
        let config = fs::read_to_string(place.path("run.toml")).unwrap();
        let part = format!(
            "\n[[ppo.reward]]\nkind = \"http\"\napi = \"pooling\"\ninput = \"ids\"\nurl = \"{url}\"\nretries = 1\n"
        );
        place.write("run.toml", config + &part);
        place
    };
    let reply = |status: &str, body: &str| {
        format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let (url, _) = pooling_server(usize::MAX, String::new);
    let whole = with(&url);
    run_all(&whole, &["ppo"]);
    let few = r#"{"object": "list", "data": [{"index": 0, "data": [1.0]}]}"#;
    let dead = r#"{"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError"}}"#;
    for (status, body, said) in [
        ("200 OK", few, "it returned 1 score for 4 responses"),
        ("500 Internal Server Error", dead, "EngineCore encountered an issue."),
        ("200 OK", "{\"data\": [{\"data\": [NaN]}]}", "its reply is not JSON"),
    ] {
        // The evaluation before training and the first rollout; the second fails.
        let wrong = reply(status, body);
        let (url, left) = pooling_server(2, move || wrong.clone());
        let broken = with(&url);
        let ran = broken.run(&line("ppo"));
        assert_eq!(ran.code, 1, "{}", ran.stderr);
        for said in [said, "all before it is kept in", "--resume", "reward model at http://"] {
            assert!(ran.stderr.contains(said), "{said}: {}", ran.stderr);
        }
        left.store(usize::MAX, Ordering::SeqCst);
        let ran = broken.run(&format!("{} --resume", line("ppo")));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        for ((name, a), (_, b)) in results(&whole, "ppo").into_iter().zip(results(&broken, "ppo")) {
            assert!(name == "metrics.jsonl" || (!a.is_empty() && a == b), "{said}: {name} differs");
        }
    }
}
