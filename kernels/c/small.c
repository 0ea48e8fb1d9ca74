/* The small work beside the products, once for every instruction set. */
#include "small.h"

#include <math.h>
#include <string.h>

#if defined(__GNUC__)
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int8_t Chars __attribute__((vector_size(16)));

#define QUERIES 4 /* that share a key head, worked at together */
#define VECTORS 4 /* of sixteen channels, added up together */
#define CHOSEN(mask, yes, no) ((Floats)(((Ints)(yes) & (mask)) | ((Ints)(no) & ~(mask))))

#define NAME(function) function##_plain
#include "small_body.h"
#undef NAME

#ifdef COMPRESS_X86
ISA_BEGINS("avx2,fma")
#define NAME(function) function##_avx2
#include "small_body.h"
#undef NAME
ISA_ENDS
ISA_BEGINS(WIDE)
#define NAME(function) function##_avx512
#include "small_body.h"
#undef NAME
ISA_ENDS
#endif

#define SMALL(isa) {ordered_##isa, rounded_##isa, scaled_##isa, norm_##isa, turn_##isa, gated_##isa, attend_##isa}

const Small *small_of(int64_t isa)
{
    static const Small plain = SMALL(plain);
#ifdef COMPRESS_X86
    static const Small avx2 = SMALL(avx2), avx512 = SMALL(avx512);
    if (isa == AVX512)
        return &avx512;
    if (isa == AVX2)
        return &avx2;
#endif
    (void)isa;
    return &plain;
}
#endif
