//! The kernel that writes residual, bias and LoRA's parts of products of many rows, on the emulated machine against float64 on the
//! operands that it multiplies.

use fourfold::device::testing::can_emulate;
use fourfold::device::{Element, Matrix};
use fourfold::ops::linear::gpu_low_rank::{FactorLayout, LowRankPart, low_rank_outputs};

use crate::group::{close, numbers, rounded};
use crate::support::{device, tolerance, wide};

/// The low-rank parts of products of many rows, on tensor cores: ranks, columns and offsets that are multiples of what is loaded at
/// once and that are not, from one part to three, in both layouts of the factors, against float64.
#[test]
fn low_rank_outputs_of_any_shape() {
    if !can_emulate() {
        return;
    }
    let device = device();
    for operand in [Element::Bf16, Element::F16] {
        for (m, n) in [(1, 1), (33, 8), (31, 64), (70, 257), (5, 301), (64, 520)] {
            // Ranks of the parts, and columns of z that belong to none.
            for (ranks, unused) in
                [(&[16, 16, 16][..], 0), (&[8], 4), (&[3, 1, 17], 2), (&[4, 12], 0), (&[64], 0), (&[], 1)]
            {
                for layout in [FactorLayout::ByColumn, FactorLayout::ByRank] {
                    let ways = [(operand, false, true), (Element::F32, true, false), (operand, true, true)];
                    // Each shape in one of these ways, in turn.
                    let by_rank = usize::from(layout == FactorLayout::ByRank);
                    let (to, residual, bias) = ways[(m + n + ranks.len() + by_rank) % 3];
                    let all = ranks.iter().sum::<usize>() + unused;
                    let z = numbers(m * all, 1);
                    let factors: Vec<Vec<f32>> =
                        ranks.iter().zip(2..).map(|(&rank, seed)| numbers(n * rank, seed)).collect();
                    let (added, of_column) = (numbers(m * n, 8), numbers(n, 9));
                    let mut want = vec![0f64; m * n];
                    let mut column = unused;
                    for (&rank, factor) in ranks.iter().zip(&factors) {
                        let (z, factor) = (rounded(operand, &wide(&z)), rounded(operand, &wide(factor)));
                        for (i, want) in want.iter_mut().enumerate() {
                            let (row, col) = (i / n, i % n);
                            for q in 0..rank {
                                let at = if layout == FactorLayout::ByRank { q * n + col } else { col * rank + q };
                                *want += z[row * all + column + q] * factor[at];
                            }
                        }
                        column += rank;
                    }
                    for (i, want) in want.iter_mut().enumerate() {
                        *want += if residual { f64::from(added[i]) } else { 0.0 };
                        *want += if bias { f64::from(of_column[i % n]) } else { 0.0 };
                    }
                    let up =
                        |element, values: &[f32], rows, cols| device.upload_as(element, values, rows, cols).unwrap();
                    let z = up(operand, &z, m, all);
                    let shape = |rank| if layout == FactorLayout::ByRank { (rank, n) } else { (n, rank) };
                    let factors: Vec<Matrix> = ranks
                        .iter()
                        .zip(&factors)
                        .map(|(&rank, factor)| up(operand, factor, shape(rank).0, shape(rank).1))
                        .collect();
                    let mut column = unused;
                    let parts: Vec<LowRankPart<'_>> = ranks
                        .iter()
                        .zip(&factors)
                        .map(|(&rank, factor)| {
                            column += rank;
                            LowRankPart { column: column - rank, factor, rank }
                        })
                        .collect();
                    let added = residual.then(|| up(Element::F32, &added, m, n));
                    let of_column = bias.then(|| up(Element::F32, &of_column, 1, n));
                    let y = device.matrix(to, m, n).unwrap();
                    let beside = (added.as_ref(), of_column.as_ref());
                    low_rank_outputs(operand, (Some(&z), &parts), layout, beside, &y).unwrap();
                    let name = format!("{operand}, ({m}, {n}), {ranks:?} from {unused}, {layout:?}, {to}");
                    let limit = if to == Element::F32 { 1e-6 } else { tolerance(operand) };
                    close(&name, limit, &y, &want);
                }
            }
        }
    }
    let z = device.matrix(Element::F16, 2, 4).unwrap();
    let factor = device.matrix(Element::F16, 3, 4).unwrap();
    let y = device.matrix(Element::F32, 2, 3).unwrap();
    let part = LowRankPart { column: 0, factor: &factor, rank: 4 };
    let of = |operand, parts: &[LowRankPart<'_>]| {
        let error = low_rank_outputs(operand, (Some(&z), parts), FactorLayout::ByColumn, (None, None), &y).unwrap_err();
        format!("{error:#}")
    };
    assert!(of(Element::F32, &[part]).contains("use bf16 or f16"));
    assert!(of(Element::F16, &[part; 4]).contains("4 parts; 3 are possible"));
    assert!(of(Element::F16, &[LowRankPart { column: 1, ..part }]).contains("z is (2, 4), where (2, 5) is needed"));
    assert!(of(Element::F16, &[LowRankPart { rank: 3, ..part }]).contains("(3, 3) is needed"));
}
