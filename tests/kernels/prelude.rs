//! The prelude's conversions and tensor-core products on the emulated machine, against the half crate and plain sums.

use std::sync::Arc;

use fourfold::device::emulated::Emulated;
use fourfold::device::kernels::with_prelude;
use fourfold::device::testing::can_emulate;
use fourfold::device::{Arguments, Device, Element, Ptr, Variant};
use half::{bf16, f16};

const TEXT: &str = r#"
struct Convert { const float* x; bf16* b; f16* h; float* back; u32 count; };
KERNEL(convert, Convert, 256) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.count) return;
    store(a.b + i, a.x[i]);
    store(a.h + i, a.x[i]);
    a.back[2 * i] = load(a.b + i);
    a.back[2 * i + 1] = load(a.h + i);
}

// One warp: C (16 x 8) = A (16 x 16) B (16 x 8), row-major, by the fragments of the PTX ISA.
struct Product { const float* x; const float* w; float* y; };
template <class T> __device__ __forceinline__ void product(const Product& a) {
    const u32 lane = threadIdx.x, g = lane >> 2, t = lane & 3;
    u32 x[4], w[2];
    for (u32 i = 0; i < 4; i++) {
        const float* p = a.x + 16 * (g + 8 * (i & 1)) + 2 * t + 8 * (i >> 1);
        x[i] = pair<T>(p[0], p[1]);
    }
    for (u32 i = 0; i < 2; i++) w[i] = pair<T>(a.w[8 * (2 * t + 8 * i) + g], a.w[8 * (2 * t + 8 * i + 1) + g]);
    float c[4] = {1.f, 1.f, 1.f, 1.f};
    mma(T(), c, x, w);
    for (u32 i = 0; i < 4; i++) a.y[8 * (g + 8 * (i >> 1)) + 2 * t + (i & 1)] = c[i];
}
KERNEL(product_bf16, Product, 32) { product<bf16>(a); }
KERNEL(product_f16, Product, 32) { product<f16>(a); }

struct Bytes { const u32* x; float* y; };
KERNEL(bytes, Bytes, 256) {
    for (int i = 0; i < 4; i++) {
        a.y[8 * threadIdx.x + i] = byte_float(a.x[threadIdx.x], i);
        a.y[8 * threadIdx.x + 4 + i] = signed_byte_float(a.x[threadIdx.x], i);
    }
}

// Shuffles of all kinds, by lane.
struct Lanes { u32* y; };
KERNEL(lanes, Lanes, 64) {
    const u32 lane = threadIdx.x & 31, v = threadIdx.x;
    u32* y = a.y + 6 * threadIdx.x;
    y[0] = __shfl_sync(~0u, v, 3);
    y[1] = __shfl_up_sync(~0u, v, 2);
    y[2] = __shfl_down_sync(~0u, v, 2);
    y[3] = __shfl_xor_sync(~0u, v, 5);
    y[4] = __ballot_sync(~0u, lane % 3 == 0);
    y[5] = (u32)(4 * __any_sync(~0u, v == 40) + 2 * __all_sync(~0u, v < 64) + __all_sync(~0u, v < 63));
}
"#;

macro_rules! arguments {
    ($name:ident, $kernel:literal, $block:literal, $($field:ident: $type:ty),*) => {
        #[repr(C)]
        struct $name { $($field: $type),* }
        // SAFETY: the fields are those of the text.
        unsafe impl Arguments for $name {
            const NAME: &'static str = $kernel;
            const BLOCK: u32 = $block;
        }
    };
}
arguments!(Convert, "convert", 256, x: Ptr, b: Ptr, h: Ptr, back: Ptr, count: u32);
arguments!(Product, "product", 32, x: Ptr, w: Ptr, y: Ptr);
arguments!(Bytes, "bytes", 256, x: Ptr, y: Ptr);
arguments!(Lanes, "lanes", 64, y: Ptr);

fn device() -> Device {
    Device::new(Arc::new(Emulated::with_text(&with_prelude(TEXT)).unwrap()))
}

#[test]
fn conversions_round_as_the_half_crate_does() {
    if !can_emulate() {
        return;
    }
    let device = device();
    // Every exponent and sign, with mantissas around the places where rounding turns.
    let mut bits: Vec<u32> = vec![];
    for top in 0..512u32 {
        for mantissa in [
            0, 1, 0xfff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x3001, 0x7fff, 0x8000, 0x8001, 0x18000, 0x7fefff, 0x7ff000,
            0x7fffff,
        ] {
            bits.push(top << 23 | mantissa);
        }
        bits.extend((0..40u32).map(|i| top << 23 | i.wrapping_mul(0x9E37_79B1 ^ top) >> 9));
    }
    let values: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
    let n = values.len();
    let x = device.upload_f32(&values, 1, n).unwrap();
    let b = device.matrix(Element::Bf16, 1, n).unwrap();
    let h = device.matrix(Element::F16, 1, n).unwrap();
    let back = device.matrix(Element::F32, n, 2).unwrap();
    let arguments = Convert {
        x: x.input("x", Element::F32, n).unwrap(),
        b: b.output("b", Element::Bf16, n).unwrap(),
        h: h.output("h", Element::F16, n).unwrap(),
        back: back.output("back", Element::F32, 2 * n).unwrap(),
        count: n as u32,
    };
    device.launch(Variant::NONE, [n.div_ceil(256) as u32, 1, 1], arguments).unwrap();
    let halves = |bytes: Vec<u8>| bytes.chunks(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect::<Vec<_>>();
    let (b, h, back) = (halves(b.to_bytes().unwrap()), halves(h.to_bytes().unwrap()), back.to_f32().unwrap());
    for i in 0..n {
        let v = values[i];
        if v.is_nan() {
            assert!(b[i] == 0x7fff && h[i] == 0x7fff && back[2 * i].is_nan() && back[2 * i + 1].is_nan());
            continue;
        }
        assert_eq!(b[i], bf16::from_f32(v).to_bits(), "{:08x}", bits[i]);
        assert_eq!(h[i], f16::from_f32(v).to_bits(), "{:08x}", bits[i]);
        assert_eq!(back[2 * i].to_bits(), bf16::from_f32(v).to_f32().to_bits());
        assert_eq!(back[2 * i + 1].to_bits(), f16::from_f32(v).to_f32().to_bits());
    }
}

#[test]
fn tensor_core_products_have_the_fragments_of_ptx() {
    if !can_emulate() {
        return;
    }
    let device = device();
    // Small whole numbers, exact in both types.
    let x: Vec<f32> = (0..256).map(|i| ((i * 7) % 13) as f32 - 6.0).collect();
    let w: Vec<f32> = (0..128).map(|i| ((i * 5) % 11) as f32 - 5.0).collect();
    let (dx, dw) = (device.upload_f32(&x, 16, 16).unwrap(), device.upload_f32(&w, 16, 8).unwrap());
    for element in [Element::Bf16, Element::F16] {
        let y = device.matrix(Element::F32, 16, 8).unwrap();
        let arguments = Product {
            x: dx.input("x", Element::F32, 256).unwrap(),
            w: dw.input("w", Element::F32, 128).unwrap(),
            y: y.output("y", Element::F32, 128).unwrap(),
        };
        device.launch(Variant::of(&[element]), [1, 1, 1], arguments).unwrap();
        for (i, y) in y.to_f32().unwrap().into_iter().enumerate() {
            let sum: f32 = (0..16).map(|k| x[16 * (i / 8) + k] * w[8 * k + i % 8]).sum();
            assert_eq!(y, 1.0 + sum, "{element} {i}");
        }
    }
}

#[test]
fn bytes_become_floats_exactly() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let words: Vec<u32> =
        (0..256u32).map(|i| u32::from_le_bytes([i as u8, 255 - i as u8, (i * 7) as u8, (i ^ 0x80) as u8])).collect();
    let (x, y) = (device.upload_u32(&words).unwrap(), device.matrix(Element::F32, 256, 8).unwrap());
    let arguments =
        Bytes { x: x.input("x", Element::U32, 256).unwrap(), y: y.output("y", Element::F32, 2048).unwrap() };
    device.launch(Variant::NONE, [1, 1, 1], arguments).unwrap();
    for (word, y) in words.iter().zip(y.to_f32().unwrap().chunks(8)) {
        for (i, byte) in word.to_le_bytes().into_iter().enumerate() {
            assert_eq!((y[i], y[4 + i]), (f32::from(byte), f32::from(byte as i8)));
        }
    }
}

#[test]
fn shuffles_go_where_cuda_says() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let y = device.matrix(Element::U32, 64, 6).unwrap();
    device.launch(Variant::NONE, [1, 1, 1], Lanes { y: y.output("y", Element::U32, 384).unwrap() }).unwrap();
    for (v, y) in (0u32..).zip(y.to_u32().unwrap().chunks(6)) {
        let (warp, lane) = (v & !31, v & 31);
        let expected = [
            warp + 3,
            if lane < 2 { v } else { v - 2 },
            if lane > 29 { v } else { v + 2 },
            warp + (lane ^ 5),
            (0..32).filter(|l| l % 3 == 0).fold(0, |mask, l| mask | 1 << l),
            if warp == 0 { 3 } else { 4 + 2 },
        ];
        assert_eq!(y, expected, "{v}");
    }
}
