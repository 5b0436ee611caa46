// The embedding: rows of a stored table, chosen by token ids, as f32. Reads the table through the storage types of
// ops/storage/gpu.cu.

// out (tokens, cols) = table[ids]. A block writes one row. An id past the end of the table writes NaN: the device's
// guards find it, and no memory outside the table is read.
struct Embedding { stored::Planes table; const unsigned* ids; float* out; unsigned rows, cols; };
template <class S> __device__ __forceinline__ void embedding(const Embedding& a) {
    __shared__ float table[16];
    stored::fill_table<S>(table);
    const unsigned id = a.ids[blockIdx.x];
    float* out = a.out + (size_t)blockIdx.x * a.cols;
    const size_t first = (size_t)id * a.cols;
    if (id >= a.rows) {
        for (unsigned i = threadIdx.x; i < a.cols; i += blockDim.x) out[i] = not_a_number();
    } else if (S::DENSE && a.cols % 16 != 0) {
        for (unsigned i = threadIdx.x; i < a.cols; i += blockDim.x)
            out[i] = stored::Single<S, S::DENSE != 0>::number(a.table, first + i);
    } else {
        for (unsigned u = threadIdx.x; u < a.cols / 16; u += blockDim.x) {
            float v[16];
            stored::decode_unit<S>(a.table, first / 16 + u, v, table);
            float* to = out + stored::first_column<S>(u);
            stored::store8(to, v);
            stored::store8(to + S::SPAN / 2, v + 8);
        }
    }
}
#define EMBEDDING(name, S) KERNEL(embedding_##name, Embedding, 128) { embedding<S>(a); }
FOR_EVERY_STORED_TYPE(EMBEDDING)
