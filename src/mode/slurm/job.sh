#!/bin/bash
# The job of one training: job.sh EXIT COMMAND ..., in the project's folder. Its exit code is left in the file EXIT.
#
# The command is a step: Slurm's notices (SIGTERM before the time limit, and at a preemption) go to steps, and not to this
# script. Nothing is filled in here; sbatch passes arguments on as they are.
exit_file=$1
shift
rm -f -- "$exit_file"
# srun takes the number of cores from no other variable.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 "$@"
code=$?
echo "$code" > "$exit_file"
exit "$code"
