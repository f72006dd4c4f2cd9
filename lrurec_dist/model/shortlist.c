/* The best rows of a table for one user, without reading all of it: by a copy of the table in half bytes.

   Row i is scale[i] * (half - 8) but for a remainder whose length is known; the user's vector is rounded to bytes likewise.
   Their product in whole numbers is off from the score by less than an error that is known: a row that cannot
   reach the k-th best score so far is left out. The others are scored as in ranking.c, to the bit. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16  /* rows side by side; eight dimensions of each are one register */
#define BLOCKS 4  /* registers at a time, so that no sum waits for the one before */
#define AHEAD 4096 /* bytes that are fetched before they are needed */
#define TOGETHER 8 /* rows that are scored together, so that no sum waits for the one before */

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>
int32_t can_shortlist(void) { return 1; }

typedef struct {
  int64_t dim, k, held, excluded_rows;
  const float *vector, *weight, *bias;
  const int32_t *excluded;
  int64_t *ids;
  float *scores;
} List;

/* Puts a score among the k best so far, best first and behind its equals, unless its row is excluded. */
static void enter(List *list, float score, int32_t row) {
  if (!(score > (list->held < list->k ? -INFINITY : list->scores[list->k - 1]))) return;
  for (int64_t e = 0; e < list->excluded_rows; e++)
    if (list->excluded[e] == row) return;
  if (list->held < list->k) list->held++;
  int64_t i = list->held - 1;
  for (; i > 0 && list->scores[i - 1] < score; i--) {
    list->scores[i] = list->scores[i - 1];
    list->ids[i] = list->ids[i - 1];
  }
  list->scores[i] = score;
  list->ids[i] = row;
}

/* Scores up to TOGETHER rows, in the order of ranking.c; returns the k-th best score, -inf while there are fewer. */
static float score_rows(List *list, int64_t count, const int32_t *rows) {
  const float *w[TOGETHER];
  float sums[TOGETHER];
  for (int64_t c = 0; c < TOGETHER; c++) {
    int32_t row = rows[c < count ? c : 0];
    w[c] = list->weight + (int64_t)row * list->dim;
    sums[c] = list->bias[row];
  }
  for (int64_t j = 0; j < list->dim; j++)
    for (int64_t c = 0; c < TOGETHER; c++) sums[c] = __builtin_fmaf(list->vector[j], w[c][j], sums[c]);
  for (int64_t c = 0; c < count; c++) enter(list, sums[c] + 0.0f, rows[c]); /* -0 is 0 */
  return list->held < list->k ? -INFINITY : list->scores[list->k - 1];
}

/* 16 numbers in bfloat16, as float32. */
static __m512 widened(const uint16_t *at) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16));
}

/* ids and scores (k) of the best rows by (-score, row); how many there are is returned, or -1 where the vector (dim) is not
   finite, or absurdly long. halves (rows / 64, eights, 64, 4): of the eight dimensions of a row, its byte j has j low and
   4 + j high. rows is a multiple of 64, and so many there are of bias (-inf: never a candidate), scale and lost, the length
   of the remainder, both in bfloat16. `excluded` are no candidates. query has room for 8 * eights. */
int32_t shortlist(int64_t rows, int64_t dim, int64_t eights, const float *vector, const float *weight, const uint8_t *halves,
                  const float *bias, const uint16_t *scale, const uint16_t *lost, int64_t excluded_rows, const int32_t *excluded,
                  int64_t k, int32_t *query, int64_t *ids, float *scores) {
  double length = 0, missing = 0;
  float largest = 0;
  int32_t offset = 0;
  for (int64_t i = 0; i < dim; i++) {
    largest = fmaxf(largest, fabsf(vector[i]));
    length += (double)vector[i] * vector[i];
  }
  if (!(length < 1e30)) return -1; /* nothing below is infinite */
  float step = largest / 127;
  memset(query, 0, eights * 8);
  for (int64_t i = 0; i < dim; i++) {
    int8_t whole = step > 0 ? (int8_t)lrintf(fminf(fmaxf(vector[i] / step, -127), 127)) : 0;
    double rounded = (double)step * whole;
    ((int8_t *)query)[i] = whole;
    offset += 8 * whole;
    missing += (vector[i] - rounded) * (vector[i] - rounded);
  }
  /* A row, and what it is rounded to, is no longer than 7 scale sqrt(dim). `unit` of that is what sums in float32 may be off
     by, here and in the score itself, twice over. */
  float unit = (dim + 16) * 0x1p-23f;
  __m512 of_lost = _mm512_set1_ps((float)(1.001 * sqrt(length))), of_bias = _mm512_set1_ps(unit);
  __m512 of_scale = _mm512_set1_ps((float)(7.01 * sqrt(dim) * (sqrt(missing) + unit * sqrt(length))));
  __m512i low = _mm512_set1_epi8(15);
  float bar = -INFINITY;
  List list = {dim, k, 0, excluded_rows, vector, weight, bias, excluded, ids, scores};
  int32_t found[TOGETHER];
  int64_t count = 0;
  for (int64_t row = 0; row < rows; row += LANES * BLOCKS) {
    __m512i sums[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) sums[b] = _mm512_set1_epi32(-offset);
    const uint8_t *at = halves + row * eights * 4;
    for (int64_t e = 0; e < eights; e++, at += BLOCKS * 64) {
      __m512i first = _mm512_set1_epi32(query[2 * e]), second = _mm512_set1_epi32(query[2 * e + 1]);
      for (int b = 0; b < BLOCKS; b++) {
        __m512i both = _mm512_loadu_si512(at + b * 64);
        _mm_prefetch(at + b * 64 + AHEAD, _MM_HINT_T0);
        sums[b] = _mm512_dpbusd_epi32(sums[b], _mm512_and_si512(both, low), first);
        sums[b] = _mm512_dpbusd_epi32(sums[b], _mm512_and_si512(_mm512_srli_epi16(both, 4), low), second);
      }
    }
    for (int b = 0; b < BLOCKS; b++) {
      int64_t first = row + b * LANES;
      __m512 biases = _mm512_loadu_ps(bias + first), scales = widened(scale + first);
      __m512 score = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[b]), _mm512_mul_ps(scales, _mm512_set1_ps(step)), biases);
      /* not a number where the bias is -inf, and never above; the last is for numbers that processors take for 0 */
      __m512 error = _mm512_fmadd_ps(of_bias, _mm512_abs_ps(biases), _mm512_set1_ps(1e-30f));
      error = _mm512_fmadd_ps(of_lost, widened(lost + first), error);
      error = _mm512_fmadd_ps(of_scale, scales, error);
      uint32_t may = _mm512_cmp_ps_mask(_mm512_add_ps(score, error), _mm512_set1_ps(bar), _CMP_GE_OQ);
      for (; may; may &= may - 1) {
        int32_t candidate = (int32_t)first + __builtin_ctz(may);
        for (int64_t j = 0; j < dim; j += 16) _mm_prefetch(weight + candidate * dim + j, _MM_HINT_T0);
        found[count++] = candidate;
        if (count < TOGETHER) continue;
        bar = score_rows(&list, count, found);
        count = 0;
      }
    }
  }
  if (count) score_rows(&list, count, found);
  return (int32_t)list.held;
}
#else
int32_t can_shortlist(void) { return 0; }
#endif
