// What is per channel alone: the packed form of the moments, and the running statistics.
#pragma once

#include <stdint.h>

#include "arguments.h"
#include "dtypes.h"

namespace {

// Of mean, M2 and n: n mean, M2 + n mean², n; in place.
inline void pack(double *moments, int64_t channels) {
    double count = moments[2 * channels];
    SIMD for (int64_t c = 0; c < channels; ++c) {
        double mean = moments[c], total = count * mean;
        moments[c] = total;
        moments[channels + c] += total * mean;
    }
}

// The inverse, to another place.
inline void unpack(const double *packed, int64_t channels, double *moments) {
    double count = packed[2 * channels], divisor = count > 0 ? count : 1;
    moments[2 * channels] = count;
    SIMD for (int64_t c = 0; c < channels; ++c) {
        double mean = packed[c] / divisor, m2 = packed[channels + c] - packed[c] * mean;
        moments[c] = mean;
        moments[channels + c] = m2 > 0 ? m2 : m2 != m2 ? m2 : 0;
    }
}

template <class P> void update_running(const Running &running, const double *moments, int64_t channels) {
    double count = moments[2 * channels];
    if (!(count > 0)) return;
    if (running.batches) ++*running.batches;
    double factor = running.cumulative ? 1 / static_cast<double>(*running.batches) : running.momentum;
    P *mean = static_cast<P *>(running.mean), *var = static_cast<P *>(running.var);
    double divisor = count > 1 ? count - 1 : 1;
    SIMD for (int64_t c = 0; c < channels; ++c) {
        mean[c] = static_cast<P>(mean[c] + factor * (moments[c] - mean[c]));
        var[c] = static_cast<P>(var[c] + factor * (moments[channels + c] / divisor - var[c]));
    }
}

}  // namespace
