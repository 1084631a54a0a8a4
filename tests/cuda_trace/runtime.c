/* CUDA's runtime for a GPU whose kernels do nothing.
 *
 * Memory is address space that the system fills with zeros when it is read, so models of any size fit as long as nobody
 * writes to them. Kernels are counted and left out, and large copies too. Values are therefore meaningless. Allocations,
 * launches, copies and waits are those of a real process. libraries.c has the driver, cuBLAS and NCCL.
 */
#include "stand_in.h"

#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MEMORY 85000000000ul
#define SPACE (1ul << 44) /* an address is not used twice */

long stand_in_counters[N_COUNTERS];
/* Called at each wait, if set: the place of a wait is that of the Python frame above it. */
void (*stand_in_on_wait)(void);

static char *space[2]; /* of the device, and pinned memory of the host */
static size_t used[2], held;
static cudaStream_t captured; /* the stream whose work becomes a graph */
static int capturing;
static uintptr_t handles = 16;

void stand_in_count(int counter) { __atomic_fetch_add(&stand_in_counters[counter], 1, __ATOMIC_RELAXED); }

void *stand_in_handle(void) { return (void *)__atomic_fetch_add(&handles, 16, __ATOMIC_RELAXED); }

/* A wait of the host for the GPU. No GPU can do it while a graph is captured. */
static cudaError_t waited(void) {
  if (capturing) return cudaErrorStreamCaptureUnsupported;
  stand_in_count(WAITS);
  if (stand_in_on_wait) stand_in_on_wait();
  return cudaSuccess;
}

static void *allocate(int pinned, size_t size) {
  if (!space[pinned]) {
    space[pinned] = mmap(NULL, SPACE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space[pinned] == MAP_FAILED) abort();
  }
  /* The size is kept in front of the block. Devices align blocks to 512 bytes; graphs of allocations to 2 MiB. */
  size_t whole = ((size + 4095) & ~4095ul) + 4096;
  char *block = space[pinned] + __atomic_fetch_add(&used[pinned], whole, __ATOMIC_RELAXED);
  *(size_t *)block = size;
  return block + 4096;
}

static void release(void *block) {
  size_t size = *(size_t *)((char *)block - 4096);
  madvise((char *)block - 4096, size + 4096, MADV_DONTNEED);
  *(size_t *)((char *)block - 4096) = 0;
}

static int is_in(int pinned, const void *p) {
  return space[pinned] && (char *)p >= space[pinned] && (char *)p < space[pinned] + SPACE;
}

/* ---- the device ---- */

cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *d) { *d = 0; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *all) { *available = MEMORY - held; *all = MEMORY; return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t e) { return e == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing" : "error of the stand-in"; }
const char *cudaGetErrorName(cudaError_t e) { return "cudaErrorOfTheStandIn"; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int d) { strncpy(id, "0000:00:00.0", size); return cudaSuccess; }

/* An H100 with 80 GB, from NVIDIA's data sheet and the CUDA programming guide, table of compute capability 9.0. */
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stand-in for a GPU (sm_90)");
  p->major = 9; p->minor = 0; p->warpSize = 32; p->multiProcessorCount = 132;
  p->totalGlobalMem = MEMORY; p->l2CacheSize = 50 << 20;
  p->sharedMemPerBlock = 48 << 10; p->sharedMemPerBlockOptin = 227 << 10; p->sharedMemPerMultiprocessor = 228 << 10;
  p->regsPerBlock = 65536; p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = 1024; p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = 65535; p->maxGridSize[2] = 65535;
  p->textureAlignment = 512; p->unifiedAddressing = 1; p->cooperativeLaunch = 1; p->managedMemory = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr a, int d) {
  switch (a) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

/* ---- memory ---- */

cudaError_t cudaMalloc(void **p, size_t size) {
  if (held + size > MEMORY) return cudaErrorMemoryAllocation;
  held += size;
  stand_in_count(ALLOCATIONS);
  *p = allocate(0, size);
  return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
  if (!p) return cudaSuccess;
  held -= *(size_t *)((char *)p - 4096);
  release(p);
  return waited(); /* a real one waits for the GPU */
}
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) { *p = allocate(1, size); return cudaSuccess; }
cudaError_t cudaFreeHost(void *p) { if (p) release(p); return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  a->type = is_in(0, p) ? cudaMemoryTypeDevice : is_in(1, p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->devicePointer = a->hostPointer = (void *)p;
  return cudaSuccess;
}

/* waits: whether the call returns after the copy. A copy to or from pageable memory does so in any case. */
static cudaError_t copy(void *to, const void *from, size_t size, int waits) {
  int to_device = is_in(0, to), from_device = is_in(0, from);
  stand_in_count(to_device && from_device ? WITHIN : to_device ? TO_DEVICE : TO_HOST);
  /* Within the GPU only small copies are made, so that the memory of activations stays untouched. */
  if (size <= (to_device && from_device ? LARGEST_COPY >> 6 : LARGEST_COPY)) memcpy(to, from, size);
  if (to_device && from_device) return cudaSuccess;
  return waits || !is_in(1, to_device ? from : to) ? waited() : cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind k) { return copy(to, from, size, 1); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind k, cudaStream_t s) { return copy(to, from, size, 0); }
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t s) { stand_in_count(FILLS); return cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { *p = allocate(0, 4096); return cudaSuccess; }

/* ---- streams, events, graphs ---- */

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = stand_in_handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { *s = stand_in_handle(); return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = stand_in_handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = stand_in_handle(); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) { *ms = 1; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return waited(); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return waited(); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return waited(); }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  *status = capturing && s == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *n) {
  if (id) *id = capturing;
  if (graph) *graph = (cudaGraph_t)16;
  if (n) *n = 0;
  return cudaStreamIsCapturing(s, status);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) { capturing = 1; captured = s; return cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) { capturing = 0; *graph = stand_in_handle(); return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t graph, unsigned long long flags) { *e = stand_in_handle(); return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { stand_in_count(GRAPHS); return cudaSuccess; }

/* ---- kernels ---- */

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  memset(grid, 0, sizeof *grid);
  memset(block, 0, sizeof *block);
  *shared = 0;
  *(void **)stream = NULL;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (cudaKernel_t)function; return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024; a->numRegs = 32; a->binaryVersion = a->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int threads, size_t shared) { *n = 1; return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int threads, size_t shared, unsigned flags) { *n = 1; return cudaSuccess; }
