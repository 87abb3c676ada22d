// The arguments of the exported functions, one struct each. binding.py packs them by the same
// layouts. The sizes of both are compared when the library is loaded.
#pragma once

#include <stdint.h>

namespace {

enum Dtype : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum Activation : int64_t { NONE, RELU, LEAKY_RELU, SILU, GELU_TANH };

struct Shape {
    int64_t n, c, s, channels_last, dtype, threads;
    int64_t values() const { return n * c * s; }
};

struct Parameters {  // of the layer: (C,) each, or null
    const void *weight, *bias;
    int64_t dtype;
};

struct Epilogue {
    int64_t activation;
    const void *residual;  // like x, or null
    uint8_t *signs;        // (ceil(values / 8),) or null
    int64_t inplace;       // x is y
};

struct MomentsArguments {
    Shape shape;
    const void *x;
    const void *mask;  // (N, S) in the type of the arithmetic, or null
    double *moments;   // (2C + 1,)
    int64_t packed;    // moments are [n mean, M2 + n mean², n], else [mean, M2, n]
};

struct Running {  // statistics, (C,) each
    void *mean, *var;
    int64_t dtype;  // of these two; -1: there are none
    int64_t *batches;  // or null
    int64_t cumulative;
    double momentum;
};

struct NormalizeArguments {
    Shape shape;
    const void *x;
    void *y;
    const double *moments;  // (2C + 1,)
    int64_t packed;
    Parameters parameters;
    double eps;
    int64_t eps_outside;
    Epilogue epilogue;
    double *statistics;  // (2C + 1,)
    Running running;
};

struct BackwardArguments {  // what both passes of the backward read
    Shape shape;
    const void *dy, *x;
    const double *statistics;  // (2C + 1,)
    Parameters parameters;
    Epilogue epilogue;
    const void *mask;
};

struct ReduceGradArguments {
    BackwardArguments of;
    int64_t dtype;  // of the next two
    void *grad_weight, *grad_bias;  // (C,)
    double *sums;  // (2, C)
};

struct GradInputArguments {
    BackwardArguments of;
    const double *sums;  // (2, C), or null
    int64_t centered;
    double eps_outside;
    void *dx;
    void *dz;  // like x, or null
};

}  // namespace
