// What stands between an MLP's matrices, number by number: m = act(gate) up, or m = act(up); mod.rs has the formulas. All
// arithmetic is f32. A thread takes four numbers.

// In the order of `Activation`: SiLU, GELU, GELU by tanh, ReLU.
template <int KIND> __device__ __forceinline__ float activation_value(float x) {
    if (KIND == 0) return x / (1.f + expf(-x));
    if (KIND == 1) return 0.5f * x * (1.f + erff(x * 0.70710678f));
    if (KIND == 2) return 0.5f * x * (1.f + tanhf(0.7978846f * (x + 0.044715f * x * x * x)));
    return x <= 0.f ? 0.f : x;  // In this order NaN passes through.
}
// d act / dx.
template <int KIND> __device__ __forceinline__ float activation_slope(float x) {
    if (KIND == 0) {
        float s = 1.f / (1.f + expf(-x));
        return s * (1.f + x * (1.f - s));
    }
    if (KIND == 1) return 0.5f * (1.f + erff(x * 0.70710678f)) + x * expf(-0.5f * x * x) * 0.3989423f;
    if (KIND == 2) {
        float t = tanhf(0.7978846f * (x + 0.044715f * x * x * x));
        return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * 0.7978846f * (1.f + 3.f * 0.044715f * x * x);
    }
    return x > 0.f ? 1.f : 0.f;
}

// `gate` is null for the plain form, whose input is `up`.
template <class T> struct ActivationForward { const T* gate; const T* up; T* m; u64 count; unsigned kind; };
template <int KIND, class T> __device__ __forceinline__ void activation_forward_of(const ActivationForward<T>& a) {
    Four f(a.count);
    float g[4], u[4], m[4];
    f.read(a.up, u);
    if (a.gate) {
        f.read(a.gate, g);
        for (int i = 0; i < 4; i++) m[i] = activation_value<KIND>(g[i]) * u[i];
    } else {
        for (int i = 0; i < 4; i++) m[i] = activation_value<KIND>(u[i]);
    }
    f.write(a.m, m);
}
template <class T> __device__ __forceinline__ void activation_forward(const ActivationForward<T>& a) {
    switch (a.kind) {
        case 0: return activation_forward_of<0>(a);
        case 1: return activation_forward_of<1>(a);
        case 2: return activation_forward_of<2>(a);
        default: return activation_forward_of<3>(a);
    }
}

// dup = dm act(gate), dgate = dm up act'(gate); in the plain form `gate` and `dgate` are null and dup = dm act'(up).
template <class T> struct ActivationBackward {
    const T* gate; const T* up; const T* dm; T* dgate; T* dup; u64 count; unsigned kind;
};
template <int KIND, class T> __device__ __forceinline__ void activation_backward_of(const ActivationBackward<T>& a) {
    Four f(a.count);
    float g[4], u[4], d[4], dg[4], du[4];
    f.read(a.up, u);
    f.read(a.dm, d);
    if (a.gate) {
        f.read(a.gate, g);
        for (int i = 0; i < 4; i++) {
            du[i] = d[i] * activation_value<KIND>(g[i]);
            dg[i] = d[i] * u[i] * activation_slope<KIND>(g[i]);
        }
        f.write(a.dgate, dg);
    } else {
        for (int i = 0; i < 4; i++) du[i] = d[i] * activation_slope<KIND>(u[i]);
    }
    f.write(a.dup, du);
}
template <class T> __device__ __forceinline__ void activation_backward(const ActivationBackward<T>& a) {
    switch (a.kind) {
        case 0: return activation_backward_of<0>(a);
        case 1: return activation_backward_of<1>(a);
        case 2: return activation_backward_of<2>(a);
        default: return activation_backward_of<3>(a);
    }
}
#define ACTIVATION(T) \
    typedef ActivationForward<T> ActivationForward_##T; \
    typedef ActivationBackward<T> ActivationBackward_##T; \
    KERNEL(activation_forward_##T, ActivationForward_##T, 256) { activation_forward(a); } \
    KERNEL(activation_backward_##T, ActivationBackward_##T, 256) { activation_backward(a); }
ACTIVATION(f32)
ACTIVATION(bf16)
ACTIVATION(f16)
