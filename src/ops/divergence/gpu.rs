//! The divergence on a device, from strips of the products of student and teacher with their lm_heads, and the gradient of a
//! strip. Formulas are in mod.rs, kernels in gpu.cu. It does not depend on roles. Read `logprobs/gpu.rs` first.

use anyhow::{Result, ensure};

use super::Divergence;
use crate::device::{Arguments, Device, Element, Matrix, Ptr, Variant};
use crate::ops::launch::{blocks, device, size};
use crate::ops::logprobs::gpu::{LogitShape, Shape, strip};

/// Numbers of a row that a block of the backward pass takes.
const TILE: usize = 256;

#[repr(C)]
struct DivergenceStrip {
    s: Ptr,
    t: Ptr,
    sums: Ptr,
    width: u32,
    s_stride: u32,
    t_stride: u32,
    fresh: u32,
    of_s: LogitShape,
    of_t: LogitShape,
}
// SAFETY: the fields are those of `DivergenceStrip` in gpu.cu.
unsafe impl Arguments for DivergenceStrip {
    const NAME: &'static str = "divergence_strip";
    const BLOCK: u32 = 256;
}

#[repr(C)]
struct DivergenceFinish {
    sums: Ptr,
    value: Ptr,
    mean: Ptr,
    lse_s: Ptr,
    lse_t: Ptr,
    rows: u32,
    beta: f32,
}
// SAFETY: the fields are those of `DivergenceFinish` in gpu.cu.
unsafe impl Arguments for DivergenceFinish {
    const NAME: &'static str = "divergence_finish";
    const BLOCK: u32 = 256;
}

#[repr(C)]
struct DivergenceMixed {
    s: Ptr,
    t: Ptr,
    lse_s: Ptr,
    lse_t: Ptr,
    value: Ptr,
    mean: Ptr,
    width: u32,
    s_stride: u32,
    t_stride: u32,
    beta: f32,
    of_s: LogitShape,
    of_t: LogitShape,
}
// SAFETY: the fields are those of `DivergenceMixed` in gpu.cu.
unsafe impl Arguments for DivergenceMixed {
    const NAME: &'static str = "divergence_mixed";
    const BLOCK: u32 = 256;
}

#[repr(C)]
struct DivergenceBackward {
    s: Ptr,
    t: Ptr,
    mean: Ptr,
    lse_s: Ptr,
    lse_t: Ptr,
    dvalue: Ptr,
    d: Ptr,
    width: u32,
    s_stride: u32,
    t_stride: u32,
    d_stride: u32,
    tiles: u32,
    beta: f32,
    of_s: LogitShape,
    of_t: LogitShape,
}
// SAFETY: the fields are those of `DivergenceBackward` in gpu.cu.
unsafe impl Arguments for DivergenceBackward {
    const NAME: &'static str = "divergence_backward";
    const BLOCK: u32 = 256;
}

/// One position's numbers, (1, R) f32 each.
struct Positions {
    value: Matrix,
    mean: Matrix,
    lse_s: Matrix,
    lse_t: Matrix,
}

/// What both sides' products become before the softmax, and the weight of the teacher in the mixture.
#[derive(Clone, Copy)]
struct Shapes {
    student: Shape,
    teacher: Shape,
    beta: f32,
}

/// Takes the next `width` ids into the sums (R, 6): columns 0..`width` of the products s and t.
fn add(sums: &Matrix, fresh: bool, (s, t): (&Matrix, &Matrix), width: usize, by: Shapes) -> Result<()> {
    let (rows, device) = (sums.rows(), device("divergence", s, &[t, sums])?);
    strip("divergence: student", s, rows, width)?;
    strip("divergence: teacher", t, rows, width)?;
    let arguments = DivergenceStrip {
        s: s.input("divergence s", Element::F32, s.len())?,
        t: t.input("divergence t", Element::F32, t.len())?,
        sums: sums.output("divergence sums", Element::F32, 6 * rows)?,
        width: size("vocabulary", width)?,
        s_stride: size("vocabulary", s.cols())?,
        t_stride: size("vocabulary", t.cols())?,
        fresh: u32::from(fresh),
        of_s: by.student.into(),
        of_t: by.teacher.into(),
    };
    device.launch(Variant::NONE, blocks(rows, 1)?, arguments)
}

/// The lse of both, and the divergence where it is not one of a mixture.
fn finish(sums: &Matrix, beta: f32) -> Result<Positions> {
    let (device, rows) = (sums.device(), sums.rows());
    let row = || device.matrix(Element::F32, 1, rows);
    let of = Positions { value: row()?, mean: row()?, lse_s: row()?, lse_t: row()? };
    let arguments = DivergenceFinish {
        sums: sums.input("divergence sums", Element::F32, 6 * rows)?,
        value: of.value.output("divergence", Element::F32, rows)?,
        mean: of.mean.output("divergence mean", Element::F32, rows)?,
        lse_s: of.lse_s.output("divergence lse", Element::F32, rows)?,
        lse_t: of.lse_t.output("divergence lse", Element::F32, rows)?,
        rows: size("divergence", rows)?,
        beta,
    };
    device.launch(Variant::NONE, blocks(rows, 256)?, arguments)?;
    Ok(of)
}

/// Adds a strip's share of the divergence to the mixture.
fn add_mixed(of: &Positions, (s, t): (&Matrix, &Matrix), width: usize, by: Shapes) -> Result<()> {
    let (rows, device) = (of.value.len(), device("divergence", s, &[t, &of.value])?);
    strip("divergence: student", s, rows, width)?;
    strip("divergence: teacher", t, rows, width)?;
    let arguments = DivergenceMixed {
        s: s.input("divergence s", Element::F32, s.len())?,
        t: t.input("divergence t", Element::F32, t.len())?,
        lse_s: of.lse_s.input("divergence lse", Element::F32, rows)?,
        lse_t: of.lse_t.input("divergence lse", Element::F32, rows)?,
        value: of.value.output("divergence", Element::F32, rows)?,
        mean: of.mean.output("divergence mean", Element::F32, rows)?,
        width: size("vocabulary", width)?,
        s_stride: size("vocabulary", s.cols())?,
        t_stride: size("vocabulary", t.cols())?,
        beta: by.beta,
        of_s: by.student.into(),
        of_t: by.teacher.into(),
    };
    device.launch(Variant::NONE, blocks(rows, 1)?, arguments)
}

/// dL by the student's products of one strip, in their place, of dL/dD (R).
fn gradient(of: &Positions, (s, t): (&Matrix, &Matrix), width: usize, dvalue: &Matrix, by: Shapes) -> Result<()> {
    let (rows, device) = (of.value.len(), device("divergence backward", s, &[t, &of.value, dvalue])?);
    strip("divergence backward: student", s, rows, width)?;
    strip("divergence backward: teacher", t, rows, width)?;
    ensure!(dvalue.len() == rows, "divergence backward: {} gradients for {rows} positions", dvalue.len());
    let tiles = width.div_ceil(TILE);
    let arguments = DivergenceBackward {
        s: s.input("divergence s", Element::F32, s.len())?,
        t: t.input("divergence t", Element::F32, t.len())?,
        mean: of.mean.input("divergence mean", Element::F32, rows)?,
        lse_s: of.lse_s.input("divergence lse", Element::F32, rows)?,
        lse_t: of.lse_t.input("divergence lse", Element::F32, rows)?,
        dvalue: dvalue.input("divergence dvalue", Element::F32, rows)?,
        d: s.output("divergence d", Element::F32, s.len())?,
        width: size("vocabulary", width)?,
        s_stride: size("vocabulary", s.cols())?,
        t_stride: size("vocabulary", t.cols())?,
        d_stride: size("vocabulary", s.cols())?,
        tiles: size("vocabulary", tiles)?,
        beta: by.beta,
        of_s: by.student.into(),
        of_t: by.teacher.into(),
    };
    device.launch(Variant::NONE, blocks(rows * tiles, 1)?, arguments)
}

/// Both lm_heads, strip by strip.
pub(super) mod heads {
    use super::*;
    use crate::ops::divergence::{TokenDivergence, common};
    use crate::ops::logprobs::gpu_head::{Head, Rows};
    use crate::ops::logprobs::{Gradients, LmHead};

    type Side<'a> = (&'a Matrix, LmHead<'a>);

    struct Both {
        student: (Head, Rows),
        teacher: (Head, Rows),
        buffers: [Matrix; 2],
        by: Shapes,
        device: Device,
        r: usize,
    }

    impl Both {
        fn of((h, student): Side<'_>, (g, teacher): Side<'_>, of: Divergence) -> Result<Self> {
            let device = super::device("divergence", h, &[g])?;
            let (ours, theirs) = (Head::of(h, &student)?, Head::of(g, &teacher)?);
            let (mine, others) = (ours.rows(h, &student)?, theirs.rows(g, &teacher)?);
            let (temperature, r) = (of.temperature, h.rows());
            let buffers = [ours.buffer(Element::F32, r)?, theirs.buffer(Element::F32, r)?];
            let (student, teacher) = (Shape::of(&student, temperature), Shape::of(&teacher, temperature));
            let by = Shapes { student, teacher, beta: of.beta as f32 };
            Ok(Self { student: (ours, mine), teacher: (theirs, others), buffers, by, device, r })
        }

        /// Calls `each(ids, the student's W of them, both products)` for the ids that both have, strip by strip.
        fn strips(
            &self,
            unscaled: Option<&Matrix>,
            mut each: impl FnMut(&std::ops::Range<usize>, &Matrix, (&Matrix, &Matrix)) -> Result<()>,
        ) -> Result<()> {
            let ((head, rows), (other, others)) = (&self.student, &self.teacher);
            head.strips_of_both(other, |ids, w, v| {
                let [l, m] = [&self.buffers[0], &self.buffers[1]].map(|buffer| Head::part(buffer, self.r, ids.len()));
                let (l, m) = (l?, m?);
                let u = unscaled.map(|u| Head::part(u, self.r, ids.len())).transpose()?;
                head.products(rows, &ids, w, &l, u.as_ref())?;
                other.products(others, &ids, v, &m, None)?;
                each(&ids, w, (&l, &m))
            })
        }
    }

    pub(in crate::ops::divergence) fn forward(
        student: Side<'_>,
        teacher: Side<'_>,
        of: Divergence,
    ) -> Result<TokenDivergence> {
        let both = Both::of(student, teacher, of)?;
        let sums = both.device.matrix(Element::F32, both.r, 6)?;
        both.strips(None, |ids, _, products| add(&sums, ids.start == 0, products, ids.len(), both.by))?;
        let found = finish(&sums, both.by.beta)?;
        if of.is_mixed() {
            both.strips(None, |ids, _, products| add_mixed(&found, products, ids.len(), both.by))?;
        }
        let mut value = found.value.to_f32()?;
        value.iter_mut().filter(|value| **value < 0.0).for_each(|value| *value = 0.0);
        let (lse_s, lse_t) = (found.lse_s.to_f32()?, found.lse_t.to_f32()?);
        Ok(TokenDivergence { value, mean: found.mean.to_f32()?, lse_s, lse_t })
    }

    pub(in crate::ops::divergence) fn backward(
        student: Side<'_>,
        teacher: Side<'_>,
        of: Divergence,
        saved: &TokenDivergence,
        dvalue: &[f32],
    ) -> Result<Gradients> {
        let ids = common(&student.1, &teacher.1);
        let both = Both::of(student, teacher, of)?;
        let (head, rows) = &both.student;
        let row = |values: &[f32]| both.device.upload_f32(values, 1, both.r);
        let (value, mean) = (row(&saved.value)?, row(&saved.mean)?);
        let found = Positions { value, mean, lse_s: row(&saved.lse_s)?, lse_t: row(&saved.lse_t)? };
        let dvalue = row(dvalue)?;
        let unscaled = Head::wants_unscaled(rows).then(|| head.buffer(Element::F32, both.r)).transpose()?;
        let mut sums = head.sums(rows)?;
        head.leave_out(&sums, ids)?;
        both.strips(unscaled.as_ref(), |ids, w, products| {
            gradient(&found, products, ids.len(), &dvalue, both.by)?;
            let u = unscaled.as_ref().map(|u| Head::part(u, both.r, ids.len())).transpose()?;
            head.add(&mut sums, rows, ids, w, products.0, u.as_ref())
        })?;
        head.finish(sums, rows)
    }
}
