/* What ../shared/paper_gpu/cudart.c lacks: functions that torch 2.4 and 2.14 call, too.
   No header is read: their types differ from version to version, these arguments do not. */
typedef void *stream_t;

int cudaGetDeviceProperties(void *card, int device);    /* of ../shared */

int cudaGetDeviceProperties_v2(void *card, int device) {
    return cudaGetDeviceProperties(card, device);
}

/* no stream is ever captured: 0; what else is asked for stays as it was */
int cudaStreamGetCaptureInfo(stream_t stream, int *status) { return *status = 0; }
int cudaStreamGetCaptureInfo_v2(stream_t stream, int *status) { return *status = 0; }
int cudaStreamGetCaptureInfo_v3(stream_t stream, int *status) { return *status = 0; }
int cudaStreamGetPriority(stream_t stream, int *priority) { return *priority = 0; }
int cudaStreamDestroy(stream_t stream) { return 0; }
int cudaFuncSetAttribute(const void *function, int name, int value) { return 0; }

int cudaKernelSetAttributeForDevice(void *kernel, int name, int value, int device) { return 0; }
int cudaHostUnregister(void *memory) { return 0; }

int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                  unsigned long shared) {
    *blocks = 1;
    return 0;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        int *blocks, const void *function, int threads, unsigned long shared, unsigned flags) {
    *blocks = 1;
    return 0;
}

/* of memory that no allocator of CUDA knows: its kind is 0 */
int cudaPointerGetAttributes(int *attributes, const void *pointer) { return attributes[0] = 0; }

int cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
    *device = host;
    return 0;
}

/* cub asks for the version that a kernel was compiled for; the first 14 words of the struct */
int cudaFuncGetAttributes(int *attributes, const void *kernel) {
    for (int i = 0; i < 14; i++)
        attributes[i] = 0;
    attributes[6] = 1024;       /* threads of a block */
    attributes[8] = 90;         /* version of the PTX */
    attributes[9] = 90;         /* version of the code */
    return 0;
}
