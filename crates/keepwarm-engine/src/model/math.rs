//! Row-wise arithmetic: plain loops that the compiler turns into vector code, in a fixed order.

use candle_core::{Device, Tensor};

use super::StepError;

/// From so many rows on, the matrix product's order of summation is the same for any number of rows
/// (measured for every shape in use: `rows_do_not_depend_on_their_batch`).
const ROWS_MIN: usize = 2;

/// `e^x`, to about one part in 10^7: Cephes' range reduction and polynomial (Moshier), without branches so
/// that it runs on vectors.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4_f32;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// Scales a row to unit root mean square, times a weight (Zhang & Sennrich 2019).
pub(super) fn rms_norm(row: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let mut lanes = [0.0f32; 8];
    let (chunks, rest) = row.as_chunks::<8>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    let sum: f32 = lanes.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
    let scale = 1.0 / (sum / row.len() as f32 + epsilon).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(row).zip(weight) {
        *out = x * scale * weight;
    }
}

/// `silu(gate) * up`, into `gate` (Shazeer 2020).
pub(super) fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// Turns scores into weights that sum to one; entries from `valid` on become exact zeros.
pub(super) fn softmax(row: &mut [f32], valid: usize) {
    let (row, masked) = row.split_at_mut(valid);
    masked.fill(0.0);
    let mut most = [f32::NEG_INFINITY; 8];
    let (chunks, rest) = row.as_chunks::<8>();
    for chunk in chunks {
        for (most, x) in most.iter_mut().zip(chunk) {
            *most = if *x > *most { *x } else { *most };
        }
    }
    let most = most.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|x| *x = exp(*x - most));
    let mut lanes = [0.0f32; 8];
    let (chunks, rest) = row.as_chunks::<8>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    let sum: f32 = lanes.iter().sum::<f32>() + rest.iter().sum::<f32>();
    let scale = 1.0 / sum;
    row.iter_mut().for_each(|x| *x *= scale);
}

/// `rows x inner` times `inner x columns`: each row's result is the same whatever the other rows are.
//= GUARANTEES.md#G7
pub(super) fn product(
    mut rows: Vec<f32>,
    count: usize,
    inner: usize,
    right: &Tensor,
) -> Result<Vec<f32>, StepError> {
    let padded = count.max(ROWS_MIN);
    rows.resize(padded * inner, 0.0);
    let left = Tensor::from_vec(rows, (padded, inner), &Device::Cpu)?;
    let mut out = left.matmul(right)?.flatten_all()?.to_vec1::<f32>()?;
    out.truncate(out.len() / padded * count);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close() {
        for step in -860..880 {
            let x = step as f32 / 10.0;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= 3e-7 * exact, "{x}: {ours} and {exact}");
        }
    }

    #[test]
    fn softmax_sums_to_one_and_masks_exactly() {
        let mut row: Vec<f32> = (0..37).map(|n| (n as f32 * 0.7).sin() * 5.0).collect();
        softmax(&mut row, 21);
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!(row[21..].iter().all(|x| x.to_bits() == 0));
    }

    /// Every shape that the two models use. Right sides that lie transposed (keys, the unembedding) are used
    /// with at least eight rows.
    #[test]
    fn rows_do_not_depend_on_their_batch() {
        let plain = [
            (576, 576),
            (576, 960),
            (576, 3072),
            (1536, 576),
            (256, 64),
            (64, 128),
            (64, 64),
            (64, 256),
            (128, 64),
            (256, 16),
        ];
        let transposed = [(64, 256), (16, 256), (576, 49_152), (64, 259)];
        let shapes =
            plain.iter().map(|shape| (shape, false)).chain(transposed.iter().map(|shape| (shape, true)));
        for ((inner, columns), transposed) in shapes {
            let right = Tensor::randn(0f32, 1.0, (*columns, *inner), &Device::Cpu).unwrap().t().unwrap();
            let right = if transposed { right } else { right.contiguous().unwrap() };
            let rows = Tensor::randn(0f32, 1.0, (300, *inner), &Device::Cpu).unwrap();
            let rows = rows.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let all = product(rows.clone(), 300, *inner, &right).unwrap();
            for count in [1, 2, 3, 5, 8, 9, 13, 16, 17, 24, 31, 33, 48, 64, 65, 100, 128, 129, 257]
                .into_iter()
                .filter(|n| !transposed || *n >= 8)
            {
                let some = product(rows[..count * inner].to_vec(), count, *inner, &right).unwrap();
                let same = some.iter().zip(&all).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{count} rows of {inner} x {columns}, transposed: {transposed}");
            }
        }
    }
}
