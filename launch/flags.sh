# Flags of XLA and libtpu, and runtime images, for each generation of devices; sourced by the launch scripts.
#
# An unknown flag ends the program when it starts, so each was parsed: those of XLA by jaxlib 0.10.2 and 0.12.0.1 (again in
# tests/test_launch.py), those of libtpu by the versions in docs/launch.md. None was timed here. XLA_FLAGS and
# LIBTPU_INIT_ARGS of the environment are used instead if they are set, also to nothing.

generation() { # TYPE: that of an accelerator, such as v5litepod-16 -> v5e
    case $1 in
        v6e-*) echo v6e ;;
        v5p-*) echo v5p ;;
        v5litepod-* | v5e-*) echo v5e ;;
        v2-* | v3-* | v4-*) echo "${1%%-*}" ;;
        *) die "--type=$1 is of no known generation: use v2-, v3-, v4-, v5litepod-, v5p- or v6e- and a number of cores or chips" ;;
    esac
}

runtime_image() { # GENERATION; source: cloud.google.com/tpu/docs/runtimes
    case $1 in
        v6e) echo v2-alpha-tpuv6e ;;
        v5p) echo v2-alpha-tpuv5 ;;
        v5e) echo v2-alpha-tpuv5-lite ;;
        *) echo tpu-ubuntu2204-base ;;
    esac
}

# Collectives run beside computation. Source: MaxText, benchmarks/xla_flags_library.py, CF_FOR_ALL_GATHER and others.
ASYNC="--xla_enable_async_all_gather=true --xla_enable_async_all_reduce=true
    --xla_tpu_overlap_compute_collective_tc=true --xla_tpu_enable_async_collective_fusion=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
# Gradients of data parallel replicas are summed while the backward pass goes on. Source: the same, DATA_PARALLEL_OVERLAP.
DATA_PARALLEL="--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"
# SDXL training on v5p. Source: tpu-recipes, training/v5p/SDXL-MaxDiffusion.
V5P="--xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true
    --xla_tpu_enable_ag_backward_pipelining=true"
# Dense models on v6e. Source: MaxText, DENSE_VMEM_LIMIT_FLAG.
V6E="--xla_tpu_scoped_vmem_limit_kib=98304"
# GPUs. Source: docs.jax.dev/en/latest/gpu_performance_tips.html (the first is also set in NVIDIA's JAX images).
GPU="--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_highest_priority_async_stream=true"

one_line() { echo $*; } # unquoted: line breaks become blanks

libtpu_init_args() { # GENERATION
    case $1 in
        v6e) one_line "$ASYNC $DATA_PARALLEL $V6E" ;;
        v5p) one_line "$ASYNC $DATA_PARALLEL $V5P" ;;
        v5e | v4) one_line "$ASYNC $DATA_PARALLEL" ;;
        *) echo ;; # v2, v3: no source
    esac
}

environment() { # GENERATION or gpu: NAME=VALUE, one a line, for the program
    case $1 in
        gpu)
            echo "XLA_FLAGS=${XLA_FLAGS-$(one_line "$GPU")}"
            # Of a GPU's memory; JAX takes 0.75. Source: NVIDIA's JAX Toolbox, GPU performance ("0.9 or 0.8").
            echo "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
            ;;
        *) echo "LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS-$(libtpu_init_args "$1")}" ;;
    esac
    # Reads from object stores that stall are given up and tried again. Source: Levanter, infra/cluster.
    echo "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=${TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS:-60}"
    echo "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=${TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES:-1024}"
}
