use super::threads::worlds;
use super::*;
use crate::error::{Diverged, exit_code};
use crate::{diverged, invalid};
use anyhow::Error;

/// What each rank of a world of threads computes, rank 0 first.
fn among<T: Send>(size: usize, of: impl Fn(&World) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = worlds(size).into_iter().map(|world| scope.spawn(|| of(&{ world }))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn sums_are_those_of_adding_in_the_order_of_the_ranks() {
    // (1 + 1e16) - 1e16 = 0 in doubles, and 1 + (1e16 - 1e16) = 1.
    let values = [1.0, 1e16, -1e16];
    let found = among(3, |world| {
        let mut value = [values[world.rank()], 1.0];
        world.sum(&mut value).unwrap();
        value
    });
    assert_eq!(found, [[0.0, 3.0]; 3]);
    let found = among(3, |world| world.concat((0..world.rank()).map(|i| i as f64 + 0.5).collect()).unwrap());
    assert_eq!(found, vec![vec![0.5, 0.5, 1.5]; 3]);
    assert_eq!(among(2, |world| world.any(world.rank() == 1).unwrap()), [true, true]);
    assert_eq!(among(2, |world| world.any(false).unwrap()), [false, false]);
    assert_eq!(among(3, |world| world.first(|| Ok(world.rank() + 7)).unwrap()), [7, 7, 7]);
}

#[test]
fn a_world_of_one_changes_nothing() {
    let world = worlds(1).remove(0);
    assert!(world.is_alone() && world.is_first() && World::default().is_alone());
    let mut values = [f64::NAN, -0.0];
    world.sum(&mut values).unwrap();
    assert!(values[0].is_nan() && values[1].is_sign_negative());
    assert_eq!(world.concat(vec![0.1, 0.2]).unwrap(), [0.1, 0.2]);
    assert_eq!(world.first(|| Ok(3)).unwrap(), 3);
    world.barrier().unwrap();
}

#[test]
fn gradients_are_summed_and_a_rank_without_any_counts_as_zero() {
    let matrix = |by: f32| Tensor::from_vec(vec![by, 2.0 * by, 3.0 * by], (1, 3), &Device::Cpu).unwrap();
    let found = among(3, |world| {
        let mut mine = Gradients::none(2);
        if world.rank() != 1 {
            let by = 1.0 + world.rank() as f32;
            mine.layers[1][2] = Some((matrix(by), matrix(-by)).into());
            mine.head_weight = Some(matrix(10.0 * by));
        }
        let sum = world.sum_gradients(mine).unwrap();
        let branch = sum.layers[1][2].clone().unwrap();
        assert!(sum.layers[0][0].is_none() && sum.head_bias.is_none() && branch.magnitude.is_none());
        let values = |t: &Tensor| t.to_vec2::<f32>().unwrap().concat();
        (values(branch.a.host().unwrap()), values(branch.b.host().unwrap()), values(&sum.head_weight.unwrap()))
    });
    let expected = (vec![4.0, 8.0, 12.0], vec![-4.0, -8.0, -12.0], vec![40.0, 80.0, 120.0]);
    assert_eq!(found, vec![expected; 3]);
}

#[test]
fn the_failure_of_one_rank_is_that_of_all_with_its_kind() {
    let fail = |which: usize, error: fn() -> Error| {
        among(3, move |world| {
            let outcome = if world.rank() >= which { Err(error()) } else { Ok(()) };
            world.agree(outcome).unwrap_err()
        })
    };
    let diverged = fail(1, || diverged!("the loss is NaN"));
    assert!(diverged.iter().all(|error| error.is::<Diverged>() && error.to_string() == "the loss is NaN"));
    let invalid = fail(2, || invalid!("no such file"));
    assert_eq!(invalid.iter().map(exit_code).collect::<Vec<_>>(), [2, 2, 2]);
    let texts: Vec<String> = invalid.iter().map(ToString::to_string).collect();
    assert_eq!(texts, ["rank 2: no such file", "rank 2: no such file", "no such file"]);
    assert_eq!(fail(0, || anyhow::anyhow!("disk")).iter().map(exit_code).collect::<Vec<_>>(), [1, 1, 1]);
    assert_eq!(among(2, |world| world.agree(Ok(world.rank())).unwrap()), [0, 1]);
    let first = among(2, |world| world.first(|| Err::<(), _>(invalid!("used"))).unwrap_err().to_string());
    assert_eq!(first, ["used", "rank 0: used"]);
}

#[test]
fn a_rank_that_is_gone_and_weights_that_differ_are_noticed() {
    let found = among(2, |world| if world.rank() == 1 { None } else { world.barrier().err() });
    assert!(found[0].as_ref().unwrap().to_string().contains("rank 1 is gone"));
    let weights = |x: f32| [Tensor::from_vec(vec![1.0, x], 2, &Device::Cpu).unwrap()];
    assert!(among(2, |world| world.check_equal(&weights(2.0)).is_ok()).into_iter().all(|equal| equal));
    let differ = among(3, |world| world.check_equal(&weights((world.rank() / 2) as f32)).unwrap_err().to_string());
    assert!(differ.iter().all(|text| text.starts_with("rank 2 holds other weights")), "{differ:?}");
}
