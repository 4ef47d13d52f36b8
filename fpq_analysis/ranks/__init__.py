"""One measurement by several processes (ranks of torch.distributed), each of which has a share of the samples."""

from fpq_analysis.ranks.division import added as added
from fpq_analysis.ranks.division import dividing as dividing
from fpq_analysis.ranks.division import gathered as gathered
from fpq_analysis.ranks.division import mean_over_ranks as mean_over_ranks
from fpq_analysis.ranks.division import n_ranks as n_ranks
from fpq_analysis.ranks.division import neighbours as neighbours
from fpq_analysis.ranks.division import on_first as on_first
from fpq_analysis.ranks.division import over_ranks as over_ranks
from fpq_analysis.ranks.division import place as place
from fpq_analysis.ranks.division import share as share
from fpq_analysis.ranks.meetings import RankLostError as RankLostError
from fpq_analysis.ranks.same import check_same as check_same
from fpq_analysis.ranks.same import same_on_all_ranks as same_on_all_ranks
