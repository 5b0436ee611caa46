//! Curves with fewer points: of each stretch the least and the greatest value stay, so no extreme is lost. It does not depend
//! on what is drawn.

/// A point of a curve; `None` where the value was NaN or infinite.
pub(crate) type Point = (f64, Option<f64>);

/// At most about `2 * stretches` points with the first, the last and every extreme of the curve among them. A stretch with
/// a value that is NaN or infinite keeps the first such point, too.
pub(crate) fn thin(points: &[Point], stretches: usize) -> Vec<Point> {
    if points.len() <= 2 * stretches {
        return points.to_vec();
    }
    let mut kept = vec![];
    for stretch in 0..stretches {
        let (from, to) = (stretch * points.len() / stretches, (stretch + 1) * points.len() / stretches);
        let known = (from..to).filter_map(|i| Some((i, points[i].1?)));
        let least = known.clone().min_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i);
        let greatest = known.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i);
        let missing = (from..to).find(|&i| points[i].1.is_none());
        let ends = [(stretch == 0).then_some(0), (stretch + 1 == stretches).then(|| points.len() - 1)];
        let mut indices: Vec<usize> = [least, greatest, missing].into_iter().chain(ends).flatten().collect();
        indices.sort_unstable();
        indices.dedup();
        kept.extend(indices.into_iter().map(|i| points[i]));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extremes_ends_and_gaps_stay_and_the_order_too() {
        let value = |i: usize| match i {
            7_777 => Some(50.0),
            12_345 => Some(-50.0),
            15_000 => None,
            _ => Some((i as f64 / 300.0).sin()),
        };
        let points: Vec<Point> = (0..20_000).map(|i| (i as f64, value(i))).collect();
        let thinned = thin(&points, 200);
        assert!(thinned.len() <= 2 * 200 + 3, "{}", thinned.len());
        for kept in [0, 7_777, 12_345, 15_000, 19_999] {
            assert!(thinned.contains(&points[kept]), "{kept}");
        }
        assert!(thinned.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!(thin(&points[..400], 200), points[..400]);
    }
}
