// A register of values, read from memory of any dtype, and what the sums need of it.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtypes.h"
#include "signs.h"

#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif

namespace {

template <class R> struct Vector {  // what a register holds, wherever it lies in memory
    typedef R type __attribute__((vector_size(VECTOR), aligned(alignof(R)), may_alias));
    typedef typename Bits<R>::type bits __attribute__((vector_size(VECTOR), aligned(alignof(R)), may_alias));
    static constexpr int64_t size = VECTOR / sizeof(R);
};

// A register of values, from memory.
template <class R> inline typename Vector<R>::type read_vector(const R *from) {
    return *reinterpret_cast<const typename Vector<R>::type *>(from);
}

inline Vector<float>::type read_vector(const bf16 *from) {
#if defined(__AVX512F__)
    __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#elif defined(__AVX2__)
    __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#elif defined(__x86_64__)
    __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), halves));
#else
    Vector<float>::type values;
    for (int64_t j = 0; j < Vector<float>::size; ++j) values[j] = single(from[j]);
    return values;
#endif
}

// How many values lie before `from` is aligned to as many as a register holds: at least 1, at most a register of them.
template <class M> inline int64_t unaligned(const M *from) {
    constexpr int64_t size = Vector<typename Arithmetic<M>::type>::size;
    return size - static_cast<int64_t>(reinterpret_cast<uintptr_t>(from) / sizeof(M) % size);
}

// Bits for each value of a vector: all from the place-th value on, none before.
template <class R> inline typename Vector<R>::bits from_place(int64_t place) {
    constexpr int64_t size = Vector<R>::size;
    static const struct Filled {
        typename Bits<R>::type bits[2 * size];
    } filled = [] {
        Filled f{};
        for (int64_t j = 0; j < size; ++j) f.bits[size + j] = ~typename Bits<R>::type{};
        return f;
    }();
    return *reinterpret_cast<const typename Vector<R>::bits *>(filled.bits + size - place);
}

// n values combined to one, half a vector and the other each time: their sum, unless told otherwise.
struct Add {
    template <class X> X operator()(X one, X other) const { return one + other; }
};
template <class R, int64_t n, class Combine = Add> inline R across(const void *values, const Combine &combine = {}) {
    if constexpr (n == 1) {
        return *static_cast<const R *>(values);
    } else {
        typedef R Half __attribute__((vector_size(n / 2 * sizeof(R))));
        Half halves[2];
        memcpy(halves, values, sizeof(halves));
        Half combined = combine(halves[0], halves[1]);
        return across<R, n / 2>(&combined, combine);
    }
}

}  // namespace
