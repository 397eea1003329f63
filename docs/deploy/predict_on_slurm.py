"""Thousands of pictures on a Slurm cluster: python predict_on_slurm.py smears found [jobs].

Needs the extra cluster and dask-jobqueue on all nodes, and folders on a disk that they share. A job is one worker with
one core; the scheduler and this program stay on the node where they were started. Repeated, it goes on where it was.
"""

import subprocess
import sys

from dask_jobqueue import SLURMCluster

if __name__ == "__main__":
    pictures, out, jobs = (*sys.argv[1:], "32")[:3]
    with SLURMCluster(cores=1, memory="3GB", walltime="04:00:00", job_name="segpc-predict") as cluster:
        cluster.adapt(maximum_jobs=int(jobs))  # as many as there is work for
        address = cluster.scheduler_address
        sys.exit(subprocess.call(["segpc", "predict", pictures, "--out", out, "--cluster", address]))
