"""What lies in an output, who may write it, and what is done with a finished one."""
