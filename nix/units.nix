{ runCommand }: runCommand "units" { } "mkdir $out"
