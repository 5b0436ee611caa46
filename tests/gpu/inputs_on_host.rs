//! Inputs of blocks that wait on the host between forward and backward. That they give the bytes of inputs that stay is in
//! `streaming.rs` and `parity.rs`, which go through every recomputation; that the planner counts the device's memory is in
//! `ledger.rs`.

use fourfold::device::Device;
use fourfold::model::adapter::{Adapter, TargetModules};
use fourfold::model::base::Base;
use fourfold::model::batch::Batch;
use fourfold::model::block::Recompute;
use fourfold::model::inputs::pinned_bytes;
use fourfold::ops::weight::ComputeDtype;

use crate::streaming::{LAYERS, base, sequences};
use crate::world::{adapter, emulated, machine, named};

/// A forward and the backward of the sum of what it returns; all gradients.
fn gradients(base: &Base, actor: &Adapter, batch: &Batch, recompute: Recompute) -> Vec<f32> {
    let (h, tape) = base.forward(batch, actor, recompute).unwrap();
    let grads = base.backward(batch, actor, tape, h).unwrap();
    named(actor, &grads).into_iter().flat_map(|(_, values)| values).collect()
}

fn input_bytes(base: &Base, batch: &Batch) -> usize {
    batch.tokens().len() * base.config().hidden_size * size_of::<f32>()
}

#[test]
fn each_input_goes_to_the_host_and_back_once_through_memory_that_the_next_pass_finds() {
    let device = Device::dry();
    let base = base(&device, 0, ComputeDtype::F16, None);
    let actor = adapter(&base, TargetModules::AllLinear, 2, 3);
    let long = Batch::new(&sequences()).unwrap();
    let short = Batch::new(&sequences()[1..]).unwrap();
    let pinned = LAYERS * pinned_bytes(input_bytes(&base, &long));
    for (batch, recompute, moved) in [
        (&long, Recompute::Block, 0),
        (&long, Recompute::Offload, 2 * LAYERS),
        (&short, Recompute::Offload, 2 * LAYERS),
        (&long, Recompute::Offload, 2 * LAYERS),
    ] {
        let before = device.work();
        let (h, tape) = base.forward(batch, &actor, recompute).unwrap();
        drop(base.backward(batch, &actor, tape, h).unwrap());
        let work = device.work() - before;
        assert_eq!((work.spilled, work.streamed), (moved * input_bytes(&base, batch), 0), "{recompute:?}");
        // A shorter pass uses what the longer one left.
        assert_eq!(base.pinned_bytes(), if moved == 0 { 0 } else { pinned });
    }
}

#[test]
fn a_device_holds_two_inputs_and_not_all_of_them() {
    let peak = |recompute| {
        let device = Device::dry();
        let base = base(&device, 0, ComputeDtype::F16, None);
        let actor = adapter(&base, TargetModules::AllLinear, 2, 3);
        let batch = Batch::new(&vec![vec![5u32; 100]; 8]).unwrap();
        device.reset_peak();
        let (h, tape) = base.forward(&batch, &actor, recompute).unwrap();
        let held = device.usage().live;
        drop(base.backward(&batch, &actor, tape, h).unwrap());
        (held, input_bytes(&base, &batch))
    };
    let ((block, input), (offload, _)) = (peak(Recompute::Block), peak(Recompute::Offload));
    assert_eq!(block - offload, (LAYERS - 2) * input, "{LAYERS} inputs, two of which have a buffer");
}

#[test]
fn a_wait_that_is_left_out_is_seen() {
    let Some((machine, device)) = machine() else { return };
    let base = base(&device, 0, ComputeDtype::F32, None);
    let actor = adapter(&base, TargetModules::AllLinear, 2, 3);
    let batch = Batch::new(&sequences()).unwrap();
    let want = gradients(&base, &actor, &batch, Recompute::Block);
    assert!(want.iter().all(|v| v.is_finite()) && want.iter().any(|&v| v != 0.0));
    machine.forget_arrivals(true);
    assert!(gradients(&base, &actor, &batch, Recompute::Offload).iter().any(|v| v.is_nan()));
    machine.forget_arrivals(false);
    assert!(gradients(&base, &actor, &batch, Recompute::Offload) == want);
}

#[test]
fn a_spill_reads_the_buffer_behind_the_work_before_it_and_a_later_fill_sees_it() {
    let Some(device) = emulated() else { return };
    let mut copies = [8, 8].map(|bytes| device.host_copy(bytes).unwrap());
    let [one, other] = [8, 8].map(|bytes| device.landing(bytes).unwrap());
    let written = |landing: &fourfold::device::Landing, byte: u8| {
        landing.arrive().unwrap();
        landing.buffer().write_bytes(&[byte; 8]).unwrap();
    };
    written(&one, 3);
    // SAFETY: the copies outlive the buffers, which alone use them.
    let error = unsafe { one.spill(&mut copies[0], 8) }.unwrap_err();
    assert!(format!("{error:#}").contains("not released"), "{error:#}");
    one.release().unwrap();
    // SAFETY: as above.
    unsafe { one.spill(&mut copies[0], 8).unwrap() };
    assert_eq!(copies[0].content().unwrap(), [0xFF; 8], "nobody has waited for it");
    // SAFETY: as above.
    unsafe { other.fill_back(&copies[0], 8).unwrap() };
    other.arrive().unwrap();
    assert_eq!(other.buffer().to_bytes().unwrap(), [3; 8], "copies are done in the order in which they were started");
    written(&one, 7);
    one.release().unwrap();
    // SAFETY: as above.
    let error = unsafe { one.spill(&mut copies[1], 16) }.unwrap_err();
    assert!(format!("{error:#}").contains("16 bytes"), "{error:#}");
    drop((one, other));
    assert_eq!(copies[0].content().unwrap(), [3; 8]);
}
