/* CUDA's driver, cuBLAS, cuBLASLt and NCCL, and the launches of CUDA's runtime, for a GPU whose kernels do nothing.
 *
 * No header of these libraries is included: the functions need not have all of their parameters. A function that PyTorch
 * calls only for its effect has none.
 */
#define _GNU_SOURCE
#include "stand_in.h"

#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

#define NOTHING(name) int name(void) { return 0; }
#define COUNTED(name, counter) int name(void) { stand_in_count(counter); return 0; }
#define HANDLE(name) int name(void **made) { *made = stand_in_handle(); return 0; }
#define ZERO(name) int name(void *of, int *value) { *value = 0; return 0; }

int cudaDeviceGetAttribute(int *value, int attribute, int device);

/* ---- CUDA's runtime ---- */

COUNTED(cudaLaunchKernel, LAUNCHES)
COUNTED(__cudaLaunchKernel, LAUNCHES)
COUNTED(cudaLaunchKernelExC, LAUNCHES)
COUNTED(cudaLaunchCooperativeKernel, LAUNCHES)
NOTHING(cudaFuncSetAttribute)
NOTHING(cudaSetDevice)
NOTHING(cudaGetLastError)
NOTHING(cudaPeekAtLastError)
NOTHING(cudaEventRecord)
NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaEventQuery)
NOTHING(cudaEventDestroy)
NOTHING(cudaStreamQuery)
NOTHING(cudaStreamDestroy)
NOTHING(cudaStreamWaitEvent)
NOTHING(cudaGraphDestroy)
NOTHING(cudaGraphExecDestroy)
NOTHING(cudaThreadExchangeStreamCaptureMode)
NOTHING(cudaProfilerStart)
NOTHING(cudaProfilerStop)
NOTHING(cudaHostRegister)
NOTHING(cudaHostUnregister)
int cudaDeviceCanAccessPeer(int *can) { *can = 0; return 0; }

int cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags, int *status) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (!*function) *function = (void *)cudaSetDevice;
  if (status) *status = 0;
  return 0;
}

/* ---- the driver, for PyTorch and Triton ---- */

NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuCtxGetLimit)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuModuleUnload)
NOTHING(cuTensorMapEncodeTiled)
HANDLE(cuCtxGetCurrent)
HANDLE(cuDevicePrimaryCtxRetain)
HANDLE(cuModuleLoad)
HANDLE(cuModuleLoadData)
HANDLE(cuModuleLoadDataEx)
HANDLE(cuModuleGetFunction)
COUNTED(cuLaunchKernel, LAUNCHES)
COUNTED(cuLaunchKernelEx, LAUNCHES)
COUNTED(cuLaunchCooperativeKernel, LAUNCHES)
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "error of the stand-in"; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(void *value, int attribute, void *pointer) { *(void **)value = pointer; return 0; }
int cuOccupancyMaxActiveClusters(int *n) { *n = 1; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { *n = 1; return 0; }

/* ---- cuBLAS and cuBLASLt: a call is one launch. In truth some products take two, and the second one is not seen. ---- */

HANDLE(cublasCreate_v2)
NOTHING(cublasDestroy_v2)
NOTHING(cublasSetStream_v2)
NOTHING(cublasSetWorkspace_v2)
NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2)
ZERO(cublasGetMathMode)
ZERO(cublasGetPointerMode_v2)
COUNTED(cublasGemmEx, PRODUCTS)
COUNTED(cublasSgemm_v2, PRODUCTS)
COUNTED(cublasDgemm_v2, PRODUCTS)
COUNTED(cublasGemmStridedBatchedEx, PRODUCTS)
COUNTED(cublasSgemmStridedBatched, PRODUCTS)
COUNTED(cublasDgemmStridedBatched, PRODUCTS)
COUNTED(cublasSgemv_v2, PRODUCTS)
COUNTED(cublasSdot_v2, PRODUCTS)
COUNTED(cublasDotEx, PRODUCTS)
HANDLE(cublasLtMatmulDescCreate)
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute)
HANDLE(cublasLtMatrixLayoutCreate)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatrixLayoutSetAttribute)
HANDLE(cublasLtMatmulPreferenceCreate)
NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
COUNTED(cublasLtMatmul, PRODUCTS)
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
    int wanted, void *results, int *found) {
  memset(results, 0, 64); /* the first one: no workspace, status success */
  memset((char *)results + 64, 0, 32);
  *found = 1;
  return 0;
}

/* ---- NCCL: a group of one process, in which every collective is a copy ---- */

long stand_in_collectives[N_NOTED]; /* how many kernels were launched before each of the last collectives */

static void stand_in_note_collective(void) {
  long before = stand_in_counters[LAUNCHES] + stand_in_counters[PRODUCTS];
  stand_in_collectives[stand_in_counters[COLLECTIVES] % N_NOTED] = before;
  stand_in_count(COLLECTIVES);
}

#define COLLECTIVE(name) \
  int name(const void *from, void *to, size_t n, int type) { \
    static const int size[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; \
    stand_in_note_collective(); \
    if (from != to && n * size[type] <= LARGEST_COPY) memcpy(to, from, n * size[type]); \
    return 0; \
  }

COLLECTIVE(ncclAllReduce)
COLLECTIVE(ncclAllGather)
COLLECTIVE(ncclReduceScatter)
COLLECTIVE(ncclBroadcast)
COLLECTIVE(ncclReduce)

NOTHING(ncclGroupStart)
NOTHING(ncclGroupEnd)
NOTHING(ncclCommDestroy)
NOTHING(ncclCommAbort)
NOTHING(ncclCommFinalize)
NOTHING(ncclCommRegister)
NOTHING(ncclCommDeregister)
HANDLE(ncclCommInitRank)
HANDLE(ncclCommInitRankConfig)
HANDLE(ncclCommInitRankScalable)
ZERO(ncclCommGetAsyncError)
ZERO(ncclCommUserRank)
COUNTED(ncclSend, COLLECTIVES)
COUNTED(ncclRecv, COLLECTIVES)
int ncclCommCount(void *group, int *n) { *n = 1; return 0; }
int ncclCommSplit(void *group, int color, int key, void **made) { *made = stand_in_handle(); return 0; }
int ncclGetUniqueId(void *id) { memset(id, 1, 128); return 0; }
int ncclGetVersion(int *version) { *version = 22809; return 0; }
const char *ncclGetErrorString(int error) { return "error of the stand-in"; }
const char *ncclGetLastError(void *group) { return ""; }
