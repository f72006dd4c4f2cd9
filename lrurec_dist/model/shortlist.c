/* The best rows of a table for one user, without reading all of it: by a copy of the table in bytes.

   Row i is scale[i] * (byte - 128), each element off by half of scale[i] at most; the user's vector is rounded likewise.
   Their product in whole numbers is off from the score by less than an error that is known: a row that cannot
   reach the k-th best score that is certain is left out. The others are scored as in ranking.c, to the bit. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16  /* rows side by side; four dimensions of each are one register */
#define BLOCKS 4  /* registers at a time, so that no sum waits for the one before */
#define AHEAD 2048 /* bytes that are fetched before they are needed */

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>
int32_t can_shortlist(void) { return 1; }

/* Puts a score into the k best so far, best first and behind its equals; returns the k-th, -inf while there are fewer. */
static float enter(float *best, int64_t *ids, int64_t *held, int64_t k, float score, int64_t id) {
  if (*held < k) (*held)++;
  else if (!(score > best[k - 1])) return best[k - 1];
  int64_t i = *held - 1;
  for (; i > 0 && best[i - 1] < score; i--) {
    best[i] = best[i - 1];
    ids[i] = ids[i - 1];
  }
  best[i] = score;
  ids[i] = id;
  return *held < k ? -INFINITY : best[k - 1];
}

/* ids and scores (k) of the best rows by (-score, row); how many there are is returned, or -1 where the vector (dim) is not
   finite, or absurdly long. bytes (rows / 64, quads, 64, 4); rows is a multiple of 64, and so many there are of bias (-inf: never a candidate),
   scale and norm, the length of a row. `excluded` are no candidates. Of the rest, query has room for 4 quads, highest and
   found for rows. */
int32_t shortlist(int64_t rows, int64_t dim, int64_t quads, const float *vector, const float *weight, const uint8_t *bytes,
                  const float *bias, const float *scale, const float *norm, int64_t excluded_rows, const int32_t *excluded,
                  int64_t k, int32_t *query, float *highest, int32_t *found, int64_t *ids, float *scores) {
  double length = 0, rounded_length = 0, lost = 0;
  float largest = 0;
  int32_t offset = 0;
  for (int64_t i = 0; i < dim; i++) {
    largest = fmaxf(largest, fabsf(vector[i]));
    length += (double)vector[i] * vector[i];
  }
  if (!(length < 1e30)) return -1; /* nothing below is infinite */
  float step = largest / 127;
  memset(query, 0, quads * 4);
  for (int64_t i = 0; i < dim; i++) {
    int8_t whole = step > 0 ? (int8_t)lrintf(fminf(fmaxf(vector[i] / step, -127), 127)) : 0;
    double rounded = (double)step * whole;
    ((int8_t *)query)[i] = whole;
    offset += 128 * whole;
    rounded_length += rounded * rounded;
    lost += (vector[i] - rounded) * (vector[i] - rounded);
  }
  /* what sums in float32 may be off by, here and in the score itself, twice over */
  float unit = (dim + 16) * 0x1p-23f;
  __m512 of_norm = _mm512_set1_ps((float)(1.001 * sqrt(lost) + unit * sqrt(length)));
  __m512 of_scale = _mm512_set1_ps((float)(0.5001 * sqrt(dim * rounded_length))), of_bias = _mm512_set1_ps(unit);
  float bar = -INFINITY;
  int64_t count = 0, held = 0;
  for (int64_t row = 0; row < rows; row += LANES * BLOCKS) {
    __m512i sums[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) sums[b] = _mm512_set1_epi32(-offset);
    const uint8_t *at = bytes + row * quads * 4;
    for (int64_t q = 0; q < quads; q++, at += BLOCKS * 64) {
      __m512i four = _mm512_set1_epi32(query[q]);
      for (int b = 0; b < BLOCKS; b++) {
        _mm_prefetch(at + b * 64 + AHEAD, _MM_HINT_T0);
        sums[b] = _mm512_dpbusd_epi32(sums[b], _mm512_loadu_si512(at + b * 64), four);
      }
    }
    for (int b = 0; b < BLOCKS; b++) {
      int64_t first = row + b * LANES;
      __m512 biases = _mm512_loadu_ps(bias + first), scales = _mm512_loadu_ps(scale + first);
      __m512 score = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[b]), _mm512_mul_ps(scales, _mm512_set1_ps(step)), biases);
      /* not a number where the bias is -inf, and never above; the last is for numbers that processors take for 0 */
      __m512 error = _mm512_fmadd_ps(of_bias, _mm512_abs_ps(biases), _mm512_set1_ps(1e-30f));
      error = _mm512_fmadd_ps(of_norm, _mm512_loadu_ps(norm + first), error);
      error = _mm512_fmadd_ps(of_scale, scales, error);
      __m512 upper = _mm512_add_ps(score, error);
      uint32_t may = _mm512_cmp_ps_mask(upper, _mm512_set1_ps(bar), _CMP_GE_OQ);
      if (!may) continue;
      float uppers[LANES], lowers[LANES];
      _mm512_storeu_ps(uppers, upper);
      _mm512_storeu_ps(lowers, _mm512_sub_ps(score, error));
      for (; may; may &= may - 1) {
        int lane = __builtin_ctz(may);
        int32_t out = uppers[lane] < bar;
        for (int64_t e = 0; e < excluded_rows; e++) out |= excluded[e] == first + lane;
        if (out) continue;
        bar = enter(scores, ids, &held, k, lowers[lane], 0);
        highest[count] = uppers[lane];
        found[count++] = (int32_t)(first + lane);
      }
    }
  }
  held = 0;
  for (int64_t i = 0; i < count; i++) {
    if (highest[i] < bar) continue;
    const float *w = weight + (int64_t)found[i] * dim;
    float score = bias[found[i]];
    for (int64_t j = 0; j < dim; j++) score = __builtin_fmaf(vector[j], w[j], score);
    if (score > -INFINITY) enter(scores, ids, &held, k, score + 0.0f, found[i]); /* -0 is 0 */
  }
  return (int32_t)held;
}
#else
int32_t can_shortlist(void) { return 0; }
#endif
