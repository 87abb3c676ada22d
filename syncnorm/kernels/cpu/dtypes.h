// The dtypes in memory, and their conversion to and from the type of the arithmetic.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "arguments.h"

#define SIMD _Pragma("omp simd")

namespace {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
template <class T> struct Arithmetic { using type = float; };
template <> struct Arithmetic<double> { using type = double; };
template <class T> struct InRegisters { using type = T; };
template <> struct InRegisters<fp16> { using type = float; };  // no compiler vectorizes a loop with its conversions

template <class T> struct Precision;  // the step from 1 to the next number, and the smallest number of full precision
template <> struct Precision<float> { static constexpr double eps = 0x1p-23, tiny = 0x1p-126; };
template <> struct Precision<double> { static constexpr double eps = 0x1p-52, tiny = 0x1p-1022; };
template <> struct Precision<bf16> { static constexpr double eps = 0x1p-7, tiny = 0x1p-126; };
template <> struct Precision<fp16> { static constexpr double eps = 0x1p-10, tiny = 0x1p-14; };

inline float single(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

inline bf16 to_bf16(float value) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(value != value ? 0x7fc0 : rounded)};
}

#if !defined(__F16C__) && !defined(__ARM_FP16_FORMAT_IEEE)
inline float single(fp16 value) {
    uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    uint32_t bits = (rest << 13) + 0x38000000;  // the exponent's bias: 127 instead of 15
    if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13;
    float result;
    if (rest < 0x400) {  // subnormal
        result = static_cast<float>(rest) * 0x1p-24f;
        memcpy(&bits, &result, 4);
    }
    bits |= sign;
    memcpy(&result, &bits, 4);
    return result;
}

inline fp16 to_fp16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and more
    if (bits < 0x38800000) {  // below 2^-14: in steps of 2^-24, which adding 1/2 rounds to
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return {static_cast<uint16_t>(sign | (bits - 0x38000000) >> 13)};
}
#endif

// A value of a segment in the type of the arithmetic, and back: in registers, where the loop around is vectorized.
inline float read(float from) { return from; }
inline double read(double from) { return from; }
inline float read(bf16 from) { return single(from); }
inline void write(float value, float *to) { *to = value; }
inline void write(double value, double *to) { *to = value; }
inline void write(float value, bf16 *to) { *to = to_bf16(value); }

// load(from, buffer, n): n values in the type of the buffer, in the buffer if they are not so already.
template <class M> const M *load(const M *from, M *, int64_t) { return from; }

inline const float *load(const bf16 *from, float *buffer, int64_t n) {
    SIMD for (int64_t i = 0; i < n; ++i) buffer[i] = single(from[i]);
    return buffer;
}

inline const float *load(const fp16 *from, float *buffer, int64_t n) {
#if defined(__F16C__)
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
    for (; i < n; ++i) buffer[i] = _cvtsh_ss(from[i].bits);
#elif defined(__ARM_FP16_FORMAT_IEEE)
    for (int64_t i = 0; i < n; ++i) buffer[i] = reinterpret_cast<const __fp16 *>(from)[i];
#else
    for (int64_t i = 0; i < n; ++i) buffer[i] = single(from[i]);
#endif
    return buffer;
}

inline void convert(const float *from, bf16 *to, int64_t n) {
    SIMD for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(from[i]);
}

inline void convert(const float *from, fp16 *to, int64_t n) {
#if defined(__F16C__)
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
    for (; i < n; ++i) to[i].bits = _cvtss_sh(from[i], 0);
#elif defined(__ARM_FP16_FORMAT_IEEE)
    for (int64_t i = 0; i < n; ++i) reinterpret_cast<__fp16 *>(to)[i] = static_cast<__fp16>(from[i]);
#else
    for (int64_t i = 0; i < n; ++i) to[i] = to_fp16(from[i]);
#endif
}

inline double number(float value) { return value; }
inline double number(double value) { return value; }
template <class T> double number(T value) {
    float buffer;
    return *load(&value, &buffer, 1);
}

inline void assign(double value, float &to) { to = static_cast<float>(value); }
inline void assign(double value, double &to) { to = value; }
inline void assign(double value, bf16 &to) { to = to_bf16(static_cast<float>(value)); }
inline void assign(double value, fp16 &to) {
    const float single_value = static_cast<float>(value);
    convert(&single_value, &to, 1);
}

// Calls a function with the data of a vector in their type.
template <class Function> void with_type(const PerChannel &of, const Function &function) {
    switch (of.dtype) {
        case FLOAT32: return function(static_cast<float *>(of.data));
        case FLOAT64: return function(static_cast<double *>(of.data));
        case BFLOAT16: return function(static_cast<bf16 *>(of.data));
        default: return function(static_cast<fp16 *>(of.data));
    }
}

inline void load(const PerChannel &from, int64_t channels, double otherwise, double *to) {
    if (!from.data)
        for (int64_t c = 0; c < channels; ++c) to[c] = otherwise;
    else
        with_type(from, [&](const auto *values) {
            for (int64_t c = 0; c < channels; ++c) to[c] = number(values[c * from.stride]);
        });
}

inline void store(const double *from, int64_t channels, const PerChannel &to) {
    with_type(to, [&](auto *values) {
        for (int64_t c = 0; c < channels; ++c) assign(from[c], values[c * to.stride]);
    });
}

}  // namespace
