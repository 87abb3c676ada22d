// A stand-in of the shape that the build expects, until the kernels are here: build.py compiles this source once
// per instruction set, whose name is SYNCNORM_ISA, and once with SYNCNORM_DISPATCH.

#define JOIN_(left, right) left##right
#define JOIN(left, right) JOIN_(left, right)
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT double JOIN(JOIN(syncnorm_, SYNCNORM_ISA), _sum)(const float* values, long count) {
    double sum = 0;
#pragma omp parallel for reduction(+ : sum) schedule(static)
    for (long i = 0; i < count; ++i) sum += values[i];
    return sum;
}

#ifdef SYNCNORM_DISPATCH
EXPORT const char* syncnorm_isa() {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return "avx2";
#endif
    return "base";
}
#endif
