// The activations and their derivatives.
#pragma once

#include <math.h>
#include <stdint.h>

#include "arguments.h"

namespace {

constexpr double NEGATIVE_SLOPE = 0.01;

inline double exponential(double x) { return exp(x); }

inline float exponential(float x) {  // 2^k * e^r with |r| <= ln(2) / 2: within 1e-7, relative
    bool large = x > 88.0f;
    x = x < -87.0f ? -87.0f : large ? 0 : x;
    union { float value; uint32_t bits; } power = {x * 1.44269504f + 12582912.0f};  // 1.5 * 2^23: rounds to k
    float k = power.value - 12582912.0f;
    float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    power.bits = (power.bits + 127) << 23;  // 2^k: the last bits were those of k
    return large ? HUGE_VALF : p * power.value;
}

template <class R> inline R sigmoid(R z) { return 1 / (1 + exponential(-z)); }

constexpr double GELU = 1.5957691216057308, CUBE = 0.044715;  // 2 sqrt(2 / π); 0.5 z (1 + tanh u) = z sigmoid(2 u)

template <class R, int64_t ACTIVATION> inline R activate(R z) {
    if constexpr (ACTIVATION == RELU) return z > 0 ? z : z != z ? z : 0;
    if constexpr (ACTIVATION == LEAKY_RELU) return z > 0 ? z : z * R(NEGATIVE_SLOPE);
    if constexpr (ACTIVATION == SILU) return z * sigmoid(z);
    if constexpr (ACTIVATION == GELU_TANH) return z * sigmoid(R(GELU) * (z + R(CUBE) * z * z * z));
    return z;
}

template <class R> inline R derivative(int64_t activation, R z) {
    R end = activation == SILU ? 87 : 10;  // beyond, it is 0 or 1
    R c = z < -end ? -end : z > end ? end : z;
    R u = activation == SILU ? c : R(GELU) * (c + R(CUBE) * c * c * c);
    R du = activation == SILU ? 1 : R(GELU) * (1 + 3 * R(CUBE) * c * c);
    R q = exponential(-u), s = 1 / (1 + q);  // q s is 1 - s, to all its digits
    return z < -end ? 0 : s + c * s * (q * s) * du;
}

}  // namespace
