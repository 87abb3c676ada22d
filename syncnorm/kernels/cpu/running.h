// What is per channel alone: the running statistics, and the packed form of the moments.
#pragma once

#include <stdint.h>

#include "arguments.h"
#include "dtypes.h"

namespace {

template <class P> void update_running(const UpdateArguments &a) {
    double count = a.moments[2 * a.c];
    if (!(count > 0)) return;
    if (a.batches) ++*a.batches;
    double factor = a.cumulative ? 1 / static_cast<double>(*a.batches) : a.momentum;
    P *mean = static_cast<P *>(a.mean), *var = static_cast<P *>(a.var);
    double divisor = count > 1 ? count - 1 : 1;
    SIMD for (int64_t c = 0; c < a.c; ++c) {
        mean[c] = static_cast<P>(mean[c] + factor * (a.moments[c] - mean[c]));
        var[c] = static_cast<P>(var[c] + factor * (a.moments[a.c + c] / divisor - var[c]));
    }
}

inline void pack(const PackArguments &a) {
    int64_t c = a.c;
    double *values = a.values, count = values[2 * c];
    SIMD for (int64_t i = 0; i < c; ++i) {
        double mean = values[i], total = count * mean;
        values[i] = total;
        values[c + i] += total * mean;
    }
}

inline void unpack(const PackArguments &a) {
    int64_t c = a.c;
    double *values = a.values, count = values[2 * c] > 0 ? values[2 * c] : 1;
    SIMD for (int64_t i = 0; i < c; ++i) {
        double mean = values[i] / count, m2 = values[c + i] - values[i] * mean;
        values[i] = mean;
        values[c + i] = m2 > 0 ? m2 : m2 != m2 ? m2 : 0;
    }
}

}  // namespace
